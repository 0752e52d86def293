"""Scores that were taken, one record per checkpoint in storage: `<root>/<name>/scores/<checkpoint>.json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import TrainJob
from pipeline.evaluation.measure import Score
from pipeline.evaluation.protocol import Protocol
from pipeline.storage import files


@dataclass(frozen=True)
class ScoreRecord:
    """The score of one checkpoint."""

    checkpoint: str
    """Name of its folder."""
    images: int
    """Position at which it was taken."""
    score: Score
    seconds: float
    """What scoring took."""
    time_ms: int
    """When it was scored, for the tracker."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": 1,
            "checkpoint": self.checkpoint,
            "images": self.images,
            "key": self.score.key,
            "value": self.score.value,
            "values": self.score.values,
            "protocol": self.score.protocol.to_dict(),
            "seconds": round(self.seconds, 2),
            "time_ms": self.time_ms,
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> ScoreRecord:
        score = Score(Protocol(**value["protocol"]), value["values"], value["key"])
        return cls(value["checkpoint"], value["images"], score, value["seconds"], value["time_ms"])


def read(job: TrainJob, checkpoint: str) -> ScoreRecord | None:
    """None where the checkpoint has not been scored."""
    try:
        return ScoreRecord.from_dict(files.read_json(job.folder.score(checkpoint)))
    except FileNotFoundError:
        return None


def write(job: TrainJob, record: ScoreRecord) -> None:
    files.write_json(job.folder.score(record.checkpoint), record.to_dict())


def scores_of(job: TrainJob) -> dict[str, ScoreRecord]:
    """All records of a run by checkpoint, oldest first."""
    found = {name: read(job, name) for name in job.folder.scored()}
    return {name: record for name, record in found.items() if record is not None}


def best(records: Iterable[ScoreRecord]) -> ScoreRecord | None:
    """The best of those that compare: protocol and metric of the one scored last. None where none has a value."""
    valued = sorted((r for r in records if r.score.value is not None), key=lambda record: record.time_ms)
    if not valued:
        return None
    last = valued[-1].score
    sign = -1 if last.higher_is_better else 1
    comparable = [r for r in valued if r.score.protocol == last.protocol and last.key in r.score.values]
    return min(comparable, key=lambda record: (sign * record.score.values[last.key], -record.images))
