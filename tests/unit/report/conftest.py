"""Runs of untrained networks on the digits, scored by an extractor that is not trained either."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import TrainJob
from pipeline.data.index import Collection
from pipeline.evaluation import evaluate
from pipeline.storage import files
from tests.unit.evaluation.conftest import checkpoint, data, digits, job, model, run_id, tracking

__all__ = ["checkpoint", "data", "digits", "job", "model", "run_id", "tracking"]


class Pixels(torch.nn.Module):
    """A 4×4 thumbnail as features, its first ten numbers as logits."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        return small, small[:, :10]


@pytest.fixture(scope="session")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("extractor") / "pixels.ts"
    torch.jit.script(Pixels()).save(str(path))
    return str(path)


@pytest.fixture
def run(
    job: TrainJob, run_id: str, checkpoint: Callable[..., str], digits: Collection, extractor: str
) -> Callable[..., str]:
    """Makes a run's folder as training leaves it, with a score for each checkpoint; returns its URL."""

    def make(name: str, samples: int = 120) -> str:
        section = job.evaluate.model_copy(update={"extractor": extractor, "samples": samples})
        track = job.track.model_copy(update={"register_model": False})
        mine = job.model_copy(update={"name": name, "evaluate": section, "track": track})
        for images in (1000, 2000):
            committed = Path(checkpoint(images, seed=images))
            here = Path(mine.folder.checkpoint(committed.name))
            here.parent.mkdir(parents=True, exist_ok=True)
            committed.rename(here)
            point = {"step": images, "time_ms": 0, "metrics": {"loss_d": 1.5, "gamma_g": 0.25}}
            (here / "metrics.jsonl").write_text(f"{json.dumps(point)}\n")
            evaluate.score_checkpoint(mine, str(here), run_id)
        record = {"name": name, "method": {"data.collection": digits.digest, "optim.lr_d": 4e-4}}
        record |= {part: getattr(mine, part).model_dump(mode="json") for part in ("data", "evaluate")}
        files.write_json(mine.folder.record, record)
        return mine.folder.url

    return make
