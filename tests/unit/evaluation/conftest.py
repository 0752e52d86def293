"""The packed digits, and untrained models that make 32 px images."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import parse
from pipeline.config.schema import DataSection, PackSection, TrainJob
from pipeline.data.index import Collection
from pipeline.data.pack import pack
from pipeline.storage import fileset
from pipeline.tracking.tracker import Tracker
from sagan.config import ModelConfig, OptimConfig
from sagan.sampling import Model
from sagan.state import TrainState

NETWORKS = ModelConfig(resolution=32, classes=10, z_dim=16, channels_g=8, channels_d=8)


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
    """A run on the digits, judged by their classifier, with a name of its own."""
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
    parsed = parse(values, "test")
    assert isinstance(parsed, TrainJob)
    return parsed


@pytest.fixture
def run_id(job: TrainJob, tmp_path: Path) -> str:
    tracker = Tracker.start(job.track.uri or "", job.name, job.name, None, {}, {}, str(tmp_path / "artifacts"))
    tracker.close(timeout_s=10)
    return tracker.run_id


@pytest.fixture
def checkpoint(job: TrainJob) -> Callable[..., str]:
    """Commits a checkpoint of an untrained state; returns its URL."""

    def commit(images: int, seed: int = 0, change: Callable[[TrainState], None] = lambda state: None) -> str:
        state = TrainState(NETWORKS, OptimConfig(), seed)
        state.images = images
        change(state)
        url = f"{job.checkpoint.root}/{job.name}/checkpoints/{images:012d}-{seed:08x}"
        with tempfile.TemporaryDirectory() as folder:
            state.save(folder)
            facts = {"images": images, "evaluate": True, "class_names": list("0123456789"), "method_digest": "ab" * 32}
            (Path(folder) / "checkpoint.json").write_text(json.dumps(facts))
            fileset.commit(Path(folder), url)
        return url

    return commit
