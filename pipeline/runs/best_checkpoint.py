"""Decides which scored checkpoint of a run is the best one."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.runs.json_records import ScoreRecord
from pipeline.runs.score_protocol import better_first, comparable


def best_score(records: Iterable[ScoreRecord]) -> ScoreRecord | None:
    """Return the best record of all that can be compared with the newest record; None where no record has a value.

    A record can be compared where its protocol equals that of the newest record and where it has the metric that ranks
    the newest record. Of two equally good records, the one with the later position wins.
    """
    valued = sorted((r for r in records if r.score.value is not None), key=lambda record: record.time_ms)
    if not valued:
        return None
    last = valued[-1].score
    rivals = [(r, score) for r in valued for score in comparable([r.score], last)]
    best, score = min(rivals, key=lambda rival: (better_first(rival[1]), -rival[0].images))
    return best.model_copy(update={"score": score})
