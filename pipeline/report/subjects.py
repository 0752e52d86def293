"""What a page can be about: a run, a model alone, or a sweep with its best trial."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipeline.config.schema import EvaluateSection
from pipeline.errors import UsageError
from pipeline.evaluation import records
from pipeline.evaluation.models import open_model, state_of
from pipeline.evaluation.records import ScoreRecord
from pipeline.storage import files
from pipeline.storage.run_folder import RunFolder
from pipeline.training import checkpoints
from sagan.discriminator import Discriminator
from sagan.sampling import Model
from sagan.state import FACTS


@dataclass(frozen=True)
class Run:
    """What storage holds of a run, beside its weights."""

    folder: RunFolder
    record: dict[str, Any]
    summary: dict[str, Any]
    scores: list[ScoreRecord]
    logged: dict[str, float]
    """The last ones that were logged before the newest checkpoint."""
    checkpoint: str
    """The one that is shown: the best that stands, else the newest."""
    commit: str | None
    """Of the code that trained it, where that is known."""

    @property
    def protocols(self) -> dict[str, dict[str, Any]]:
        """What scores of the run were taken under, by id."""
        found = {record.score.protocol.id8: record.score.protocol.to_dict() for record in self.scores}
        for name in ("score", "final"):
            if score := self.summary.get(name):
                found[score["protocol"]["id"]] = {k: v for k, v in score["protocol"].items() if k != "id"}
        return found


@dataclass(frozen=True)
class Subject:
    """One column of the page: a run, or a model alone."""

    name: str
    model: Model
    discriminator: Discriminator | None
    run: Run | None


@dataclass
class Opened:
    """Everything that a page is about."""

    subjects: list[Subject] = field(default_factory=list)
    sweeps: list[RunFolder] = field(default_factory=list)

    def add(self, where: str) -> None:
        """A run's or a sweep's folder, a checkpoint, a pulled folder, or models:/NAME@ALIAS; of a sweep the best trial.

        Raises UsageError, EnvironmentFault, CorruptError.
        """
        if where.startswith("models:/"):
            self._add(Subject(where, open_model(where, _device()), None, None), where)
            return
        where = str(files.local_path(where)) if files.is_local(where) else where.rstrip("/")
        folder = RunFolder(where)
        if not files.exists(folder.record):
            self._add(_of_model(where), where)
        elif "method" in (record := files.read_json(folder.record)):
            self._add(_of_run(folder, record), where)
        else:
            self._add_sweep(folder)

    def _add(self, subject: Subject, where: str) -> None:
        taken = any(subject.name == other.name for other in self.subjects)
        self.subjects.append(replace(subject, name=where) if taken else subject)

    def _add_sweep(self, folder: RunFolder) -> None:
        if not files.exists(folder.summary):
            raise UsageError(f"the sweep {folder.url} has not ended yet", "let it end, or name one of its trials")
        self.sweeps.append(folder)
        best = files.read_json(folder.summary)["best"]["trial"]
        self.add(files.join(folder.url.rpartition("/")[0], best))


def _of_model(where: str) -> Subject:
    if files.exists(files.join(where, FACTS)):
        return Subject(files.name(where), *_networks(where, EvaluateSection()), None)
    try:
        return Subject(files.name(where), open_model(where, _device()), None, None)
    except UsageError as error:
        raise UsageError(f"{where} is neither run, sweep nor model: {error.message}", _HOW) from None


def _of_run(folder: RunFolder, record: dict[str, Any]) -> Subject:
    standing = folder.checkpoints()
    if not standing:
        raise UsageError(f"the run {folder.url} has no checkpoint yet", "wait for its first")
    scores = [ScoreRecord.from_dict(files.read_json(folder.score(name))) for name in folder.scored()]
    best = records.best(score for score in scores if score.checkpoint in standing)
    shown = best.checkpoint if best else standing[-1]
    lines = files.read_bytes(files.join(folder.checkpoint(standing[-1]), checkpoints.METRICS)).splitlines()
    run = Run(
        folder=folder,
        record=record,
        summary=files.read_json(folder.summary) if files.exists(folder.summary) else {},
        scores=scores,
        logged=json.loads(lines[-1])["metrics"] if lines else {},
        checkpoint=shown,
        commit=files.read_json(files.join(folder.checkpoint(shown), checkpoints.FACTS)).get("commit"),
    )
    section = EvaluateSection.model_validate(record["evaluate"])
    return Subject(record["name"], *_networks(folder.checkpoint(shown), section), run)


def _networks(checkpoint: str, section: EvaluateSection) -> tuple[Model, Discriminator]:
    state, names = state_of(checkpoint, _device())
    model = Model.from_state(
        state,
        weights=section.generator,
        standing_images=section.standing_images,
        seed=section.seed,
        class_names=names,
    )
    return model, state.discriminator


_HOW = (
    "the folder of a run or a sweep is <checkpoint.root>/<name>; a checkpoint's URL, models:/NAME@ALIAS and a folder "
    "that `sagan pull` wrote will do too"
)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
