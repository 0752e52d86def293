"""Registered models as foreign inputs of `sagan pull`: files of a version, checkpoint, tags, and an earlier pull."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random

from pipeline.storage.file_sets import MANIFEST, Manifest, read_manifest
from pipeline.tracking import registry
from pipeline.tracking.champion import promote_best
from pipeline.tracking.mlflow_run import MlflowRun
from tests.faults.hostile.kind import Kind, Names, command, is_picture, one_of, rewrite
from tests.faults.hostile.models import change_checkpoint, change_model
from tests.faults.hostile.random_changes import NUMBERS, TEXTS, changed_json, damaged

_DATABASE, _LIST = "mlflow.db", "pulled/.pulled.json"
_COLUMNS = {  # texts that a person who registers a model chooses
    "model_version_tags": ("key", "value"),
    "model_versions": ("source", "storage_location", "status", "status_message", "current_stage", "version", "name"),
    "registered_model_aliases": ("alias", "version", "name"),
}
_PATHS = {"model_versions": ("source", "storage_location"), "model_version_tags": ("value",)}


def _change_version(folder: Path, random: Random, names: Names) -> None:
    """Change the files of the version, what the registry says about it, or the folder of an earlier pull."""
    stored = _stored(folder)
    match random.choice(("model", "model", "file", "tree", "tree", "registry", "registry", "pulled")):
        case "model":
            change_model(stored, random, names)
        case "file":
            rewrite(random.choice(sorted(path for path in stored.rglob("*") if path.is_file())), damaged, random)
        case "tree":
            _change_tree(stored, random, names)
        case "registry":
            _change_registry(folder, random, names)
            return
        case _:
            _change_pulled(folder / "pulled", random, names)
            return
    if random.random() < 0.5:  # as somebody who can write to the server does
        (stored / MANIFEST).unlink()
        manifest = Manifest.of(stored)
        (stored / MANIFEST).write_bytes(manifest.to_bytes())
        _execute(folder, "UPDATE model_version_tags SET value = ? WHERE key = 'files_sha256'", manifest.digest)


def _change_registered_checkpoint(folder: Path, random: Random, names: Names) -> None:
    if random.random() < 0.3:
        _change_registry(folder, random, names)
        return
    change_checkpoint(folder / "checkpoint", random, names)
    if random.random() < 0.7 and (digest := _digest_of(folder / "checkpoint")):
        _execute(folder, "UPDATE model_version_tags SET value = ? WHERE key = 'checkpoint_sha256'", digest)


def _change_tree(stored: Path, random: Random, names: Names) -> None:
    """Add, delete or replace a file of the version."""
    files = sorted(path for path in stored.rglob("*") if path.is_file() and path.name != MANIFEST)
    file = random.choice(files)
    match random.choice(("add", "delete", "link", "folder", "copy")):
        case "add":
            name = random.choice((".pulled.json", "code/torch.py", "\x1b[2J", "é" * 99, "a\\b", "~", "-x", ".hidden"))
            (stored / name).write_text("x")
        case "delete":
            file.unlink()
        case "link":
            file.unlink()
            file.symlink_to(random.choice([*names, "/dev/zero", "..", file.name]))
        case "folder":
            file.unlink()
            file.mkdir()
        case _:
            shutil.copyfile(file, random.choice([path for path in files if path != file]))


def _change_registry(folder: Path, random: Random, names: Names) -> None:
    """Change a text in the registry, such as the path of the files or the value of a tag."""
    table = random.choice(sorted(_COLUMNS))
    column = random.choice(_COLUMNS[table])
    value = str(random.choice([random.choice(NUMBERS[:-1]), random.choice(TEXTS), *names]))
    value = value.encode(errors="replace").decode()
    with closing(sqlite3.connect(folder / _DATABASE)) as database, database:
        rows = [row for (row,) in database.execute(f"SELECT rowid FROM {table} ORDER BY rowid")]  # noqa: S608
        row = random.choice(rows)
        if random.random() < 0.1:
            database.execute(f"DELETE FROM {table} WHERE rowid = ?", (row,))  # noqa: S608
        else:
            database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, row))  # noqa: S608


def _change_pulled(pulled: Path, random: Random, names: Names) -> None:
    """Change the list of the files that an earlier pull wrote, or put links in the way of the next pull."""
    match random.choice(("list", "list", "link", "folder")):
        case "list":
            rewrite(pulled / ".pulled.json", changed_json, random, names)
        case "link":
            path = random.choice([pulled / "code", *sorted(path for path in pulled.rglob("*") if path.is_file())])
            path.unlink() if path.is_file() else shutil.rmtree(path)
            path.symlink_to(random.choice(names))
        case _:
            path = one_of(pulled, "*.json", random)
            path.unlink()
            (path / "inside").mkdir(parents=True)


def _pull(*commands: str) -> Callable[[Path, Path], None]:
    """Return a function that runs commands in the registry of the input."""
    read = command(*commands)

    def relocate_and_read(source: Path, out: Path) -> None:
        for table, columns in _PATHS.items():
            for column in columns:  # the registry has absolute paths of the clean input
                change = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"  # noqa: S608
                _execute(source, change, str(source.parents[2] / "clean" / "registry"), str(source))
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{source / _DATABASE}"
        read(source, out)

    return relocate_and_read


def _is_pulled(out: Path, printed: str) -> bool:
    """Whether the folder holds exactly the files whose digest the registry has, and the model draws pictures."""
    registry_folder, pulled = out.parent / "in", out.parent / "in" / "pulled"
    expected = read_manifest(str(pulled))
    tags = _select(registry_folder, "SELECT value FROM model_version_tags WHERE key = 'files_sha256'")
    if expected is None or expected.digest not in tags:
        return False
    found = {
        path.relative_to(pulled).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in pulled.rglob("*")
        if path.is_file()
    }
    extra = {MANIFEST: found[MANIFEST], ".pulled.json": found[".pulled.json"]}
    return found == {name: entry.sha256 for name, entry in expected.files.items()} | extra and is_picture(out, printed)


def _is_pulled_checkpoint(out: Path, printed: str) -> bool:
    tags = _select(out.parent / "in", "SELECT value FROM model_version_tags WHERE key = 'checkpoint_sha256'")
    return (out / "state" / "state.safetensors").exists() and len(tags) == 1


def _stored(folder: Path) -> Path:
    """Return the folder of the version in the artifact store."""
    return next(folder.glob("artifacts/**/MLmodel")).parent


def _digest_of(folder: Path) -> str | None:
    try:
        return Manifest.from_bytes((folder / MANIFEST).read_bytes(), MANIFEST).digest
    except Exception:  # it was changed
        return None


def _execute(folder: Path, statement: str, *values: str) -> None:
    with closing(sqlite3.connect(folder / _DATABASE)) as database, database:
        database.execute(statement, values)


def _select(folder: Path, statement: str) -> list[str]:
    with closing(sqlite3.connect(folder / _DATABASE)) as database:
        return [str(value) for (value,) in database.execute(statement)]


def build(root: Path) -> None:
    """Write a registry with one version, its checkpoint, and the folder of an earlier pull below `root`."""
    folder = root / "registry"
    folder.mkdir()
    uri = f"sqlite:///{folder / _DATABASE}"
    tracker = MlflowRun.start(uri, "tiny", "tiny", None, {}, {}, str(folder / "artifacts"))
    tracker.close(timeout_s=10)
    checkpoint = Path(shutil.copytree(root / "evaluated" / "checkpoint", folder / "checkpoint"))
    tags = {"metric": "fd/1", "fd/1": "1.0", "better": "lower", "protocol": "{}", "checkpoint": str(checkpoint)}
    tags["checkpoint_sha256"] = str(_digest_of(checkpoint))
    exported = Path(shutil.copytree(root / "model", folder / "exported", ignore=shutil.ignore_patterns(MANIFEST)))
    registry.register(uri, "tiny", exported, tracker.run_id, tags)
    shutil.rmtree(exported)
    promote_best(uri, "tiny")
    registry.pull(uri, "models:/tiny@champion", folder / "pulled")


_ROW = "registered models and their checkpoints"
_PULL = _pull("pull models:/tiny@champion IN/pulled", "sample IN/pulled --n 2")
_PULL_CHECKPOINT = _pull("pull models:/tiny/1 OUT/state --checkpoint")
KINDS = {
    "registered model": Kind(_ROW, 8, "registry", _change_version, _PULL, _is_pulled),
    "registered checkpoint": Kind(
        _ROW, 3, "registry", _change_registered_checkpoint, _PULL_CHECKPOINT, _is_pulled_checkpoint
    ),
}
