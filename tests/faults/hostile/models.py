"""Checkpoints, models, statistics of a collection, and rows of a served model as foreign inputs."""

from __future__ import annotations

import base64
import io
import json
import pickle
import shutil
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from pipeline.runs.stored_run import StoredRun
from pipeline.storage.file_sets import MANIFEST
from pipeline.tracking import registry
from sagan.config import OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model
from tests.faults.hostile.kind import NETWORKS, Kind, Names, command, is_json, is_picture, one_of, refit, rewrite
from tests.faults.hostile.random_changes import changed_json, changed_tensors, hostile_value

CODE = "import pathlib\npathlib.Path({path!r}).write_text('ran')\n"


def _change_evaluated(folder: Path, random: Random, names: Names) -> None:
    change_checkpoint(folder / "checkpoint", random, names)


def change_checkpoint(checkpoint: Path, random: Random, names: Names) -> None:
    """Change a file of a checkpoint or its manifest, and mostly correct the manifest."""
    match random.choice(("facts", "facts", "tensors", "tensors", "checkpoint", "manifest")):
        case "facts":
            rewrite(checkpoint / "state.json", changed_json, random, names)
        case "tensors":
            rewrite(checkpoint / "state.safetensors", changed_tensors, random, names)
        case "checkpoint":
            rewrite(checkpoint / "checkpoint.json", changed_json, random, names)
        case _:
            rewrite(checkpoint / MANIFEST, changed_json, random, names)
            return
    if random.random() < 0.9:
        refit(checkpoint)


def change_model(folder: Path, random: Random, names: Names) -> None:
    match random.choice(("facts", "facts", "tensors", "tensors", "manifest", "code")):
        case "facts":
            rewrite(folder / "config.json", changed_json, random, names)
        case "tensors":
            rewrite(folder / "generator.safetensors", changed_tensors, random, names)
        case "code":
            path = folder / "code" / "sagan" / "__init__.py"
            path.write_text(CODE.format(path=random.choice(names)) + path.read_text())
        case _:
            rewrite(folder / MANIFEST, changed_json, random, names)
            return
    if random.random() < 0.9:
        refit(folder)


def _change_statistics(folder: Path, random: Random, names: Names) -> None:
    stored = one_of(folder, "collection/evaluation/*", random)
    if random.random() < 0.5:
        rewrite(stored / MANIFEST, changed_json, random, names)
        return
    rewrite(one_of(stored, "*.safetensors", random), changed_tensors, random, names)
    refit(stored)


def _change_rows(folder: Path, random: Random, names: Names) -> None:
    """Write a table of rows as a client sends it; Python's pickle keeps values that JSON does not have."""
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())
    for _ in range(random.choice((1, 1, 2))):
        row, key = random.choice(rows), random.choice(("class", "seed", "truncation", "other", ""))
        row[key] = hostile_value(random, names)
    if random.random() < 0.05:
        tables: list[list[dict[str, Any]]] = [[], rows * 400, [{}] * 1025, [{}] * 70]
        rows = random.choice(tables)
    (folder / "rows.pkl").write_bytes(pickle.dumps(rows))


def _predict(source: Path, out: Path) -> None:
    """Give the rows to the model as MLflow's loader serves it."""
    import mlflow.pyfunc
    import pandas as pd  # type: ignore[import-untyped]
    from mlflow.exceptions import MlflowException

    model = mlflow.pyfunc.load_model(str(source / "served"), suppress_warnings=True)
    changed = source / "rows.pkl"
    rows = pickle.loads(changed.read_bytes()) if changed.exists() else json.loads((source / "rows.json").read_text())
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: pd.Series([row.get(name) for row in rows], dtype=object) for name in names}
    try:
        answer = model.predict(pd.DataFrame(columns, index=range(len(rows))))
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        print(f"error: {error.message}")
        raise SystemExit(2) from None
    assert len(answer) == len(rows)
    (out / "answer.json").write_text(answer.to_json(orient="records"))


def _are_answers(out: Path, printed: str) -> bool:
    for row in json.loads((out / "answer.json").read_text()):
        with Image.open(io.BytesIO(base64.b64decode(row["png"]))) as image:
            if image.size != (32, 32) or row["class"] not in ("ant", "bee"):
                return False
    return True


def build(root: Path) -> None:
    """Write a clean model, and what is evaluated and served, below `root`."""
    model = Model.from_state(TrainState(NETWORKS, OptimConfig(), 0), standing_images=None, class_names=["ant", "bee"])
    model.save(root / "model")
    refit(root / "model")
    (root / "predict").mkdir()
    registry._packaged(root / "model", root / "predict" / "served")
    rows = [{"class": "ant", "seed": 1, "truncation": 0.5}, {"class": 1}, {}]
    (root / "predict" / "rows.json").write_text(json.dumps(rows))
    shutil.copytree(root / "collection-png", root / "evaluated" / "collection")
    shutil.copytree(root / "runs" / "collection" / "evaluation", root / "evaluated" / "collection" / "evaluation")
    shutil.copytree(root / "model", root / "evaluated" / "model")
    run = StoredRun(str(root / "runs" / "run"))
    shutil.copytree(run.checkpoints()[-1].url, root / "evaluated" / "checkpoint")


_EVALUATE = "--reference IN/collection --extractor classifier --samples 4 --running --json --gpus 0"
_START = "run CLEAN/job/job.yaml --dry-run --json init.source"
_ROW = "checkpoints, models, statistics"
KINDS = {
    "checkpoint": Kind(
        _ROW, 6, "evaluated", _change_evaluated, command(f"evaluate IN/checkpoint {_EVALUATE}"), is_json
    ),
    "model": Kind(_ROW, 8, "model", change_model, command("sample IN --n 2"), is_picture),
    "start": Kind(_ROW, 3, "evaluated", _change_evaluated, command(f"{_START}=IN/checkpoint"), is_json),
    "start from a model": Kind(_ROW, 3, "model", change_model, command(f"{_START}=IN"), is_json),
    "statistics": Kind(_ROW, 5, "evaluated", _change_statistics, command(f"evaluate IN/model {_EVALUATE}"), is_json),
    "rows": Kind("rows of a served model", 8, "predict", _change_rows, _predict, _are_answers),
}
