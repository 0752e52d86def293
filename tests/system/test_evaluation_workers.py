"""Scores on Ray workers are those of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from pipeline.collection.manifest import Collection
from pipeline.compute.cluster import connect
from pipeline.config.schema import DataSection, EvaluateSection, PackSection
from pipeline.errors import EnvironmentFault
from pipeline.evaluation.features import Features, Generated, NotFinite, Real
from pipeline.evaluation.scorer import Scorer, open_scorer
from pipeline.packing.pack import pack
from sagan.config import ModelConfig, OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model
from tests.system.command_process import ray_workers

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("ray")]

SAMPLES = 300  # in five chunks, the last of them smaller
# Convolutions of another batch add up in another order, and a generated pixel at the border of two grey levels may fall
# to either: one level in one pixel moves these features by up to 1e-4.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


class Small(torch.nn.Module):
    """Convolved features and logits of ten classes, from seeded weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.convolution = torch.nn.Conv2d(3, 16, 5, stride=4)
            self.head = torch.nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.convolution(images.float() / 255).relu().mean((2, 3))
        return features, self.head(features)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """A Ray of this process's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        connect(3)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("extractor") / "small.ts"
    torch.jit.script(Small()).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return pack(str(tmp_path_factory.mktemp("digits") / "shards"), PackSection(source="digits", resolution=32))


@pytest.fixture(scope="module")
def model() -> Model:
    networks = ModelConfig(resolution=32, num_classes=10, z_dim=16, channels_g=8, channels_d=8)
    return Model.from_state(TrainState(networks, OptimConfig(), seed=0), standing_images=64)


@contextmanager
def scorer_with(extractor: str, digits: Collection, folder: Path, workers: int, batch: int = 64) -> Iterator[Scorer]:
    data = DataSection(train=digits.url, cache=str(folder))
    section = EvaluateSection(
        extractor=extractor, trust_extractor=True, workers=workers, batch=batch, feature_metrics=True
    )
    with open_scorer(section, digits, data, 0) as scorer:
        yield scorer


def both(scorer: Scorer, model: Model) -> tuple[Features, Features]:
    real = Real(scorer.collection, np.asarray(scorer.collection.ids("train"))[:SAMPLES], scorer.data)
    return (
        scorer.features(Generated(model, 0, range(7, 7 + SAMPLES)), "samples", keep=True),
        scorer.features(real, "real images", keep=True),
    )


def assert_equal(ours: Features, theirs: Features, *, rtol: float = 0, atol: float = 0) -> None:
    assert ours.moments.count == theirs.moments.count == SAMPLES
    torch.testing.assert_close(ours.labels, theirs.labels, rtol=0, atol=0)
    for a, b in (
        (ours.rows, theirs.rows),
        (ours.logits, theirs.logits),
        (ours.moments.mean, theirs.moments.mean),
        (ours.moments.scatter, theirs.moments.scatter),
    ):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_three_workers_give_the_features_and_the_score_of_one_process_also_when_one_dies(
    extractor: str, digits: Collection, model: Model, tmp_path: Path
) -> None:
    def score(scorer: Scorer) -> dict[str, float]:
        return scorer.score(model, scorer.protocol(model, seed=0, samples=SAMPLES)).values

    with scorer_with(extractor, digits, tmp_path, 1) as alone, scorer_with(extractor, digits, tmp_path, 3) as together:
        expected = both(alone, model)

        def require_the_same() -> None:
            for ours, theirs in zip(both(together, model), expected, strict=True):
                assert_equal(ours, theirs)

        require_the_same()
        os.kill(ray_workers("PoolActor", ray.get_runtime_context().gcs_address)[0], signal.SIGKILL)
        require_the_same()
        assert score(together) == score(alone)


@pytest.mark.parametrize(("batch", "workers"), [(1, 1), (7, 2)])
def test_the_batch_changes_features_by_rounding_alone(
    batch: int, workers: int, extractor: str, digits: Collection, model: Model, tmp_path: Path
) -> None:
    with (
        scorer_with(extractor, digits, tmp_path, 1) as usual,
        scorer_with(extractor, digits, tmp_path, workers, batch) as other,
    ):
        for ours, theirs in zip(both(other, model), both(usual, model), strict=True):
            assert_equal(ours, theirs, **ROUNDING)


def test_workers_that_find_no_room_are_refused(extractor: str, digits: Collection, tmp_path: Path) -> None:
    refused = pytest.raises(EnvironmentFault, match=r"50 evaluation workers need 50 CPUs; the cluster has")
    with refused, scorer_with(extractor, digits, tmp_path, 50):
        pass


class Infinite(Small):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.convolution(images.float()).relu().mean((2, 3))
        return features / 0, self.head(features)


def test_an_error_of_a_worker_is_the_error_of_one_process(digits: Collection, model: Model, tmp_path: Path) -> None:
    torch.jit.script(Infinite()).save(str(tmp_path / "infinite.ts"))
    errors = []
    for workers in (1, 2):
        with (
            pytest.raises(NotFinite) as caught,
            scorer_with(str(tmp_path / "infinite.ts"), digits, tmp_path, workers) as scorer,
        ):
            both(scorer, model)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert "Traceback" not in errors[0]


@pytest.mark.parametrize("what", [pytest.param("self-test", marks=pytest.mark.slow), "score"])
def test_the_command_starts_what_its_workers_need(
    what: str, extractor: str, digits: Collection, model: Model, tmp_path: Path
) -> None:
    model.save(tmp_path / "model")
    asked = ["--self-test"] if what == "self-test" else [str(tmp_path / "model")]
    arguments = ["--reference", digits.url, "--extractor", extractor, "--trust-extractor", "--samples", "100"]
    arguments += ["--workers", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "evaluate", *asked, *arguments], capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert found["self_test"] if what == "self-test" else found["score"]["value"] > 0
