"""Job files of training runs, sweeps and studies as foreign inputs."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import yaml

from sagan.config import OptimConfig
from tests.faults.hostile.kind import NETWORKS, Kind, Names, command, is_json, rewrite
from tests.faults.hostile.random_changes import changed_value, damaged


def _change_job(folder: Path, random: Random, names: Names) -> None:
    path = folder / "job.yaml"
    text = path.read_text()
    if random.random() < 0.2:
        rewrite(path, damaged, random)
    elif random.random() < 0.25:
        values = [
            "&a [*a]", "!!python/object/apply:os.system ['id']", "1e309", ".inf", "-.nan", "${HOME}", "${", "0o17", "{",
            "[" * 500, "<<: *x", "2001-01-01", "!!binary AAAA", "&b {c: *b}", "'", "1_000", "0x" + "f" * 99, "? a", "~",
            "[&z [0,0,0,0,0,0,0,0,0,0], " + ", ".join(["*z"] * 3000) + "]", "9" * 5000, "\x1b[2J", "1:30",
        ]  # fmt: skip
        lines = text.split("\n")
        at = random.randrange(len(lines))
        lines[at] = lines[at].partition(":")[0] + ": " + random.choice(values)
        path.write_text("\n".join(lines))
    else:
        value = changed_value(yaml.safe_load(text), random, names)
        path.write_text(yaml.safe_dump(value, allow_unicode=random.random() < 0.5), errors="backslashreplace")


def build(root: Path) -> None:
    """Write a clean job, a clean sweep job and a clean study job below `root`."""
    data = {"train": str(root / "collection-png"), "lanes": 2}
    train = {"kind": "train", "name": "tiny", "data": data, "model": {**NETWORKS.to_dict(), "num_classes": 2}}
    train |= {"optim": OptimConfig().to_dict(), "train": {"kimg": 1, "batch": 4, "workers": 2}}
    train |= {"evaluate": {"extractor": "classifier", "samples": 10}, "resources": {"env": {"A": "b"}}}
    (root / "job").mkdir()
    (root / "job" / "job.yaml").write_text(yaml.safe_dump(_lists(train)))
    (root / "sweep-job").mkdir()
    (root / "sweep-job" / "base.yaml").write_text(yaml.safe_dump(_lists(train)))
    space = {"optim.lr_d": {"loguniform": [1e-4, 1e-3]}, "train.batch": {"choice": [4, 8]}}
    sweep = {"kind": "tune", "name": "sweep", "base": "base.yaml", "space": space, "overrides": {"train.kimg": 2}}
    sweep |= {"search": {"trials": 2, "initial_points": [{"optim.lr_d": 2e-4}]}, "schedule": {"grace_kimg": 1}}
    (root / "sweep-job" / "job.yaml").write_text(yaml.safe_dump(sweep))
    (root / "study-job").mkdir()
    (root / "study-job" / "base.yaml").write_text(yaml.safe_dump(_lists(train)))
    published = {"metric": "fid", "value": 18.28, "source": "a paper", "protocol": "theirs"}
    rows = {"none": {"kimg": 2.5}, "more": {"overrides": {"train.batch": 8}, "published": [published]}}
    study = {"kind": "study", "name": "study", "base": "base.yaml", "seeds": [0, 1], "kimg": 2, "rows": rows}
    study |= {"overrides": {"optim.n_dis": 2}, "compare": {"metrics": ["fid"], "reference": "none", "score": "best"}}
    (root / "study-job" / "job.yaml").write_text(yaml.safe_dump(study))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


_DRY_RUN, _ROW = command("run IN/job.yaml --dry-run --json"), "jobs, sweep and study jobs"
KINDS = {
    "job": Kind(_ROW, 10, "job", _change_job, _DRY_RUN, is_json),
    "sweep job": Kind(_ROW, 5, "sweep-job", _change_job, _DRY_RUN, is_json),
    "study job": Kind(_ROW, 3, "study-job", _change_job, _DRY_RUN, is_json),
}
