"""The packed digits, and untrained models that make 32 px images."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.collection.manifest import Collection
from pipeline.config.job_file import parse_job
from pipeline.config.schema import DataSection, PackSection, TrainJob
from pipeline.packing.pack import pack
from pipeline.runs.checkpoints import StoredCheckpoint, upload_checkpoint, write_checkpoint
from pipeline.runs.json_records import CheckpointFacts
from pipeline.runs.stored_run import StoredRun
from pipeline.tracking.mlflow_run import MlflowRun
from sagan.config import ModelConfig, OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model

NETWORKS = ModelConfig(resolution=32, num_classes=10, z_dim=16, channels_g=8, channels_d=8)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return pack(str(tmp_path_factory.mktemp("digits") / "shards"), PackSection(source="digits", resolution=32))


@pytest.fixture(scope="session")
def data(digits: Collection, tmp_path_factory: pytest.TempPathFactory) -> DataSection:
    return DataSection(train=digits.url, cache=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def model() -> Model:
    return Model.from_state(TrainState(NETWORKS, OptimConfig(), seed=0), standing_images=64)


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a tracker's database; making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}"


@pytest.fixture
def job(digits: Collection, data: DataSection, tracking: str, tmp_path: Path) -> TrainJob:
    """A run on the digits, scored by their classifier, with a name of its own."""
    values: dict[str, Any] = {
        "kind": "train",
        "name": f"digits-{uuid.uuid4().hex[:8]}",
        "data": data.model_dump(),
        "model": NETWORKS.to_dict(),
        "train": {"kimg": 1, "batch": 32},
        "checkpoint": {"root": str(tmp_path / "runs")},
        "evaluate": {"extractor": "classifier", "samples": 120, "standing_images": 64, "grid": 20},
        "track": {"uri": tracking},
    }
    parsed = parse_job(values, "test")
    assert isinstance(parsed, TrainJob)
    return parsed


@pytest.fixture
def run_id(job: TrainJob, tmp_path: Path) -> str:
    tracker = MlflowRun.start(job.track.uri or "", job.name, job.name, None, {}, {}, str(tmp_path / "artifacts"))
    tracker.close(timeout_s=10)
    return tracker.run_id


def commit_checkpoint(
    job: TrainJob,
    images: int,
    seed: int = 0,
    change: Callable[[TrainState], object] = lambda state: None,
    points: Sequence[dict[str, Any]] = (),
    **facts: Any,
) -> StoredCheckpoint:
    """Write a checkpoint of an untrained state into the run of `job`, as training does.

    `change` is applied to the state, `points` are the logged metrics, and `facts` replace fields of `CheckpointFacts`.
    """
    state = TrainState(NETWORKS, OptimConfig(), seed)
    state.images = images
    change(state)
    stated: dict[str, Any] = {
        "images": images,
        "train_seconds": 1.0,
        "to_score": True,
        "collection_digest": "cd" * 32,
        "class_names": list("0123456789"),
        "method_digest": "ab" * 32,
        "git_commit": "unknown",
    }
    with tempfile.TemporaryDirectory() as temp:
        local = Path(temp) / "checkpoint"
        local.mkdir()
        metrics = "".join(f"{json.dumps(point)}\n" for point in points).encode()
        name = write_checkpoint(local, state, metrics, CheckpointFacts(**stated | facts))
        checkpoint = StoredRun.of(job).checkpoint(name)
        upload_checkpoint(local, checkpoint)
    return checkpoint


@pytest.fixture
def checkpoint(job: TrainJob) -> Callable[..., StoredCheckpoint]:
    """`commit_checkpoint` for the run of `job`."""
    return partial(commit_checkpoint, job)
