"""The subjects of a page: a run, a model without a run, a sweep with its best trial, or a study with a run of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pipeline.config.schema import DataSection, EvaluateSection, TrainJob
from pipeline.errors import CorruptError, UsageError
from pipeline.runs.best_checkpoint import best_score
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.json_records import RunRecord, ScoreRecord, TrainSummary
from pipeline.runs.score_protocol import ScoreProtocol
from pipeline.runs.spending import Spending
from pipeline.runs.stored_run import StoredRun, StoredStudy, StoredSweep, open_folder
from pipeline.storage import files
from pipeline.tracking.open_model import is_checkpoint, load_checkpoint, model_of_state, open_model
from sagan.discriminator import Discriminator
from sagan.trained_model import Model

_REMEDY = (
    "give the folder of a run or a sweep (<checkpoint.root>/<name>) or of a study (<checkpoint.root>/studies/<name>), "
    "a checkpoint's URL, models:/NAME@ALIAS, or a folder that `sagan pull` wrote"
)


@dataclass(frozen=True)
class RunOfPage:
    """Stored facts about a run."""

    stored: StoredRun
    record: RunRecord
    summary: TrainSummary | None
    scores: list[ScoreRecord]
    spending: Spending | None
    """What the run has spent; None where no driver has said it."""
    logged: dict[str, float]
    """Last metrics that were logged before the newest checkpoint."""
    checkpoint: StoredCheckpoint
    """The checkpoint of the page: the best complete checkpoint, or without scores the newest."""
    git_commit: str
    """Git commit of the code that wrote the checkpoint."""

    @property
    def protocols(self) -> dict[str, ScoreProtocol]:
        """Protocols of the run's scores, by `id8`."""
        protocols = [record.score.protocol for record in self.scores]
        if self.summary:
            protocols += [score.protocol for score in (self.summary.score, self.summary.final) if score]
        return {protocol.id8: protocol for protocol in protocols}


@dataclass(frozen=True)
class Reader:
    """Values of the person who reads a run, by key of the sections `data` and `evaluate`.

    The record of a run only describes. It does not decide which files and which folders of the reader are used.
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, job: TrainJob) -> Reader:
        """Return the reader of a run of one's own, who uses the files and folders of the job."""
        return cls(job.data.model_dump(), job.evaluate.model_dump())

    def data_of(self, record: RunRecord) -> DataSection:
        """Return where the images of a run are, and the reader's cache."""
        return DataSection(**{**record.data.model_dump(), **self.data})

    def section_of(self, record: RunRecord) -> EvaluateSection:
        """Return how to compute features as the scores of a run. Raises UsageError, CorruptError.

        An extractor file is a program. It is used only where the reader gives it.
        """
        recorded = record.evaluate.model_dump()
        if "extractor" in self.evaluate:
            recorded = {key: recorded[key] for key in ("split", "samples", "seed", "weights", "standing_images")}
        elif Path(record.evaluate.extractor).suffix:
            raise UsageError(
                f"the run was scored with the extractor file {record.evaluate.extractor}, which is a program",
                "if you trust your copy of the file, give it: --extractor FILE --extractor-sha256 SHA256",
            )
        try:
            section = EvaluateSection(**{**recorded, **self.evaluate, "workers": 1})  # a page needs no cluster
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
            raise CorruptError(f"{record.name} cannot have been scored as its run.json says: {problem}") from error
        return section


@dataclass(frozen=True)
class Subject:
    """One column of the page: a run, or a model without a run."""

    name: str
    model: Model
    discriminator: Discriminator | None
    run: RunOfPage | None


@dataclass
class Subjects:
    """All subjects of a page."""

    columns: list[Subject] = field(default_factory=list)
    sweeps: list[StoredSweep] = field(default_factory=list)
    studies: list[StoredStudy] = field(default_factory=list)

    def add(self, where: str) -> None:
        """Add a subject. For a sweep, add its best trial. For a study, add a run of its reference row.

        Args:
            where: Folder of a run, a sweep or a study, URL of a checkpoint, pulled folder, or models:/NAME@ALIAS.

        Raises UsageError, EnvironmentFault, CorruptError.
        """
        if where.startswith("models:/"):
            self._add(Subject(where, open_model(where, _device()), None, None), where)
            return
        where = str(files.local_path(where)) if files.is_local(where) else where.rstrip("/")
        folder = open_folder(where)
        if folder is None:
            self._add(_of_model(where), where)
        elif isinstance(folder, StoredRun):
            self._add(_of_run(folder), where)
        elif isinstance(folder, StoredSweep):
            self._add_sweep(folder)
        else:
            self._add_study(folder)

    def _add(self, subject: Subject, where: str) -> None:
        taken = any(subject.name == other.name for other in self.columns)
        self.columns.append(replace(subject, name=where) if taken else subject)

    def _add_sweep(self, sweep: StoredSweep) -> None:
        summary = sweep.summary()
        if summary is None:
            raise UsageError(
                f"the sweep {sweep.url} has not ended yet", "wait until it ends, or give the folder of a trial"
            )
        self.sweeps.append(sweep)
        self.add(sweep.trial(summary.best.name).url)

    def _add_study(self, study: StoredStudy) -> None:
        summary = study.summary()
        if summary is None or summary.shown is None:
            raise UsageError(
                f"the study {study.url} has no run of its reference row that has ended",
                "wait until it ends, or give the folder of one of its runs",
            )
        self.studies.append(study)
        self.add(study.run(summary.shown).url)


def _of_model(where: str) -> Subject:
    if is_checkpoint(where):
        return Subject(files.name(where), *_networks(StoredCheckpoint(where), EvaluateSection()), None)
    try:
        return Subject(files.name(where), open_model(where, _device()), None, None)
    except UsageError as error:
        raise UsageError(f"{where} is neither a run nor a sweep nor a model: {error.message}", _REMEDY) from None


def _of_run(stored: StoredRun) -> Subject:
    record, checkpoints = stored.record(), stored.checkpoints()
    assert record is not None
    if not checkpoints:
        raise UsageError(f"the run {stored.url} has no checkpoint yet", "wait for its first checkpoint")
    scores = stored.scores()
    complete = {checkpoint.name for checkpoint in checkpoints}
    best = best_score(score for score in scores if score.checkpoint in complete)
    chosen = stored.checkpoint(best.checkpoint) if best else checkpoints[-1]
    point, summary = checkpoints[-1].last_point(), stored.summary()
    run = RunOfPage(
        stored=stored,
        record=record,
        summary=summary,
        scores=scores,
        spending=summary.spending if summary else stored.spending(),
        logged=point.metrics if point else {},
        checkpoint=chosen,
        git_commit=chosen.facts().git_commit,
    )
    scored = record.evaluate
    section = EvaluateSection(weights=scored.weights, standing_images=scored.standing_images, seed=scored.seed)
    return Subject(record.name, *_networks(chosen, section), run)


def _networks(checkpoint: StoredCheckpoint, section: EvaluateSection) -> tuple[Model, Discriminator]:
    state, class_names = load_checkpoint(checkpoint, _device())
    return model_of_state(state, class_names, section), state.discriminator


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
