"""The training worker on the simulated GPU ends in the CPU's checkpoint, bit for bit, also after a resume."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pipeline.config.job_file import parse_job
from pipeline.config.schema import PackSection, TrainJob
from pipeline.packing.pack import pack
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.training.shared_types import Assignment
from pipeline.training.worker import training_loop
from tests.faults.kills import FileSender
from tests.simulated_gpu import simulated_gpu
from tests.simulated_gpu.simulated_gpu import Record
from tests.tracker_database import tracker_database
from tests.unit.training.test_lost_mlflow_run import start_run

BATCH, STEPS = 16, 4  # the first worker ends after half of the steps


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("collection")
    return pack(str(folder / "digits"), PackSection(source="digits", resolution=32, shard_images=500)).url


def work(
    folder: Path, collection: str, device: str, steps: int, augment: str | None = "diffaugment"
) -> tuple[StoredCheckpoint, Record]:
    """Run one worker to the end of `steps` steps, and return the last checkpoint of the run."""
    values: dict[str, Any] = {
        "name": f"run-{device}-{augment or 'plain'}",
        "kind": "train",
        "seed": 7,
        "data": {"train": collection, "cache": str(folder / "cache"), "flip": True, "augment": augment},
        "model": {"channels_g": 4, "channels_d": 4, "multipliers_g": [4, 4, 4, 4], "multipliers_d": [2, 2, 2, 2]},
        "train": {"kimg": steps * BATCH / 1000, "batch": BATCH, "precision": "bf16", "log_kimg": BATCH / 1000},
        "checkpoint": {"root": str(folder / "runs"), "kimg": 2 * BATCH / 1000},
        "evaluate": {"extractor": "classifier", "kimg": 1000, "samples": 100},
        "track": {"uri": tracker_database(folder), "register": False},
    }
    job = parse_job(values, "test")
    assert isinstance(job, TrainJob)
    run = start_run(job)
    assert run.owner is not None
    sender = FileSender(folder / f"mailbox-{job.name}")
    assignment = Assignment(
        job=run.job.model_dump(mode="json", by_alias=True),
        tracking_uri=run.tracking_uri,
        mlflow_run_id=run.mlflow_run_id,
        owner=run.owner.number,
        driver=sender,  # type: ignore[arg-type]
        method_digest=run.method_digest,
        secrets={},
        score_in_line=None,
        step_timeout_s=300.0,
    )
    with mock.patch.object(training_loop, "worker_device", return_value=torch.device(device)), Record() as record:
        training_loop.train_worker(assignment, "")
    return run.stored.checkpoints()[-1], record


def test_a_worker_augments_where_the_job_says_so(tmp_path: Path, collection: str) -> None:
    augmented, plain = (work(tmp_path, collection, "cpu", 1, augment)[0].name for augment in ("diffaugment", None))
    assert augmented != plain, "the name holds a digest of all tensors"


def places(counted: Counter[str]) -> Counter[str]:
    """Return counts by the name of the file that they come from."""
    files: Counter[str] = Counter()
    for key, count in counted.items():
        files[Path(key.split()[-1].rpartition(":")[0]).name] += count
    return files


def test_a_worker_trains_as_on_the_cpu(tmp_path: Path, collection: str) -> None:
    for steps in (STEPS // 2, STEPS):
        expected, _ = work(tmp_path, collection, "cpu", steps)
        found, record = work(tmp_path, collection, simulated_gpu.NAME, steps)
        assert found.images == steps * BATCH
        assert found.name == expected.name, "the name holds a digest of all tensors"
        ours, theirs = ([json.loads(line)["metrics"] for line in c.metrics().splitlines()] for c in (found, expected))
        assert len(ours) == steps
        for a, b in zip(ours, theirs, strict=True):
            kept = [name for name in b if name.startswith(("loss", "logit", "gradient", "gamma", "sigma"))]
            assert {name: a[name] for name in kept} == {name: b[name] for name in kept}
        # One wait for the metrics of each step and one for the values of each log, and two for the checkpoint: whether
        # the state is finite, and its copy.
        waits = {"finite_check.py": STEPS // 2 + 1, "training_loop.py": STEPS // 2, "device.py": 1}
        assert places(record.syncs) == waits
        assert set(places(record.pageable)) <= {"train_state.py"}, "copies from pageable memory restore the state alone"
