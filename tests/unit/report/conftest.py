"""Runs of untrained networks on the digits, scored by an extractor that is not trained either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.collection.manifest import Collection
from pipeline.config.schema import StudyJob, TrainJob
from pipeline.evaluation.score_checkpoints import score_checkpoint
from pipeline.runs.json_records import (
    RecordedData,
    RecordedEvaluation,
    RunRecord,
    StudyRecord,
    StudySummary,
    StudyTables,
)
from pipeline.runs.score_protocol import Score
from pipeline.runs.stored_run import StoredRun, StoredStudy
from pipeline.study.compare_rows import Outcome, tables_of
from pipeline.study.study_picture import curves_of, draw_curves
from tests.unit.evaluation.conftest import checkpoint, commit_checkpoint, data, digits, job, model, run_id, tracking

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
def run(job: TrainJob, run_id: str, digits: Collection, extractor: str) -> Callable[..., str]:
    """Makes a run's folder as training leaves it, with a score for each checkpoint; returns its URL."""

    def make(name: str, samples: int = 120) -> str:
        section = job.evaluate.model_copy(update={"extractor": extractor, "trust_extractor": True, "samples": samples})
        track = job.track.model_copy(update={"register_model": False})
        mine = job.model_copy(update={"name": name, "evaluate": section, "track": track})
        for images in (1000, 2000):
            point = {"step": images, "time_ms": 0, "metrics": {"loss_d": 1.5, "gamma_g": 0.25}}
            committed = commit_checkpoint(mine, images, seed=images, points=[point])
            score_checkpoint(mine, committed, run_id)
        record = RunRecord(
            name=name,
            method={"data.collection": digits.digest, "optim.lr_d": 4e-4},
            mlflow_run_id=run_id,
            data=RecordedData.of(mine.data),
            evaluate=RecordedEvaluation.of(section),
        )
        stored = StoredRun.of(mine)
        stored.write_record(record)
        return stored.url

    return make


@pytest.fixture
def study() -> Callable[[StoredRun], StoredStudy]:
    """Makes the folder of a study that has ended, beside a run of its reference row."""

    def make(shown: StoredRun) -> StoredStudy:
        stored = StoredStudy(str(Path(shown.url).parent / "studies" / "s"))
        assert stored.run(shown.name) == shown
        source = {"metric": "fd_pixels", "value": 2.0, "source": "a <paper>", "protocol": "theirs"}
        job = StudyJob(
            name="s",
            base="base.yaml",
            seeds=[0, 1],
            rows={"none": {}, "feat16": {"published": [source]}},
            compare={"metrics": ["fd_pixels"], "reference": "none"},
        )
        protocol = shown.scores()[0].score.protocol
        outcomes = [
            Outcome(row, seed, Score.of(protocol, "fd_pixels", False, {"fd_pixels": value + seed}))
            for row, value in (("none", 3.0), ("feat16", 1.5))
            for seed in (0, 1)
        ]
        stored.write_record(StudyRecord(name="s", mlflow_run_id="0", runs=[shown.name]))
        stored.write_tables(StudyTables(tables=tables_of(job, outcomes, {"fd_pixels": False})))
        draw_curves(curves_of({"none": shown.scores()}, ["fd_pixels"]), Path(stored.picture_url))
        stored.write_summary(
            StudySummary(
                name="s",
                runs=4,
                diverged=0,
                images=8000,
                shown=shown.name,
                mlflow_run_id="0",
                table=stored.table_url,
                picture=stored.picture_url,
                tuned={"feat16": {"optim.lr_d": 4e-4}},
            )
        )
        return stored

    return make
