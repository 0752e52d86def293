"""All modules follow the rules for folders, names and imports, and old names do not occur."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_MODULES = 10  # in a folder
RAY_FOLDERS = {"pipeline.compute", "pipeline.training", "pipeline.training.status", "pipeline.tuning"}
OLD_NAMES = (
    "StepBorder",
    "at_border",
    "open_evaluator",
    "speaks_of",
    "RunFolder",
    "judge_seed",
    "model.classes",
    "evaluate.generator",
    "evaluate.precision",
    "evaluate.precision_recall",
    "search.at_once",
    "search.first",
    "state.average",
)


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def modules_of(package: str) -> list[Path]:
    """The files of a package without `__init__` and `__main__`."""
    return [path for path in files_of(package) if path.stem not in ("__init__", "__main__")]


def module_name(path: Path) -> str:
    """The dotted name of a file. The name of an `__init__.py` is that of its package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports: at its top, under TYPE_CHECKING and inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph() -> dict[str, set[str]]:
    """Each module of both packages, and the modules that it imports by name. Empty `__init__.py` files are left out."""
    texts = {module_name(path): path for path in (*files_of("sagan"), *files_of("pipeline"))}
    holding = {name: path for name, path in texts.items() if path.read_text().strip()}

    def target(name: str) -> str:
        """The module that `name` is or belongs to."""
        while name and name not in texts:
            name = name.rpartition(".")[0]
        return name

    return {name: {target(given) for given in imports(path)} & holding.keys() for name, path in holding.items()}


def text_files(folder: str) -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / folder).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path != Path(__file__).resolve():
            try:
                yield path, path.read_text()
            except UnicodeDecodeError:
                continue


def test_a_folder_has_at_most_ten_modules() -> None:
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in modules_of("pipeline"))
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_no_two_modules_have_the_same_name() -> None:
    names = Counter(path.stem for path in modules_of("pipeline"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_modules_import_each_other_in_a_cycle() -> None:
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_graph_has_imports_under_type_checking_and_inside_functions() -> None:
    """The test above needs these imports."""
    graph = import_graph()
    assert "pipeline.evaluation.self_test" in graph["pipeline.job_runner"]  # under TYPE_CHECKING
    assert "pipeline.packing.pack" in graph["pipeline.job_runner"]  # inside a function
    assert "pipeline.doctor.doctor" in graph["pipeline.cli"]  # from pipeline.doctor import doctor
    assert "sagan.batch_norm" in graph["sagan.step"]  # from sagan import batch_norm


def test_only_compute_training_and_tuning_import_ray() -> None:
    importing = {module_name(path) for path in files_of("pipeline") + files_of("sagan") if "ray" in roots(path)}
    assert importing, "the search must find some imports"
    assert {name for name in importing if name.rpartition(".")[0] not in RAY_FOLDERS} == set()


def roots(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("folder", ["sagan", "pipeline", "jobs", "infra", "tests"])
def test_old_names_do_not_occur(folder: str) -> None:
    old = re.compile(rf"\b({'|'.join(map(re.escape, OLD_NAMES))})\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path, text in text_files(folder)
        for number, line in enumerate(text.splitlines(), 1)
        if (match := old.search(line))
    ]
    assert found == []
