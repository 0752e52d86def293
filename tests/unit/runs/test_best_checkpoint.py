from __future__ import annotations

from pipeline.runs.best_checkpoint import best_score
from pipeline.runs.json_records import ScoreRecord
from pipeline.runs.score_protocol import Score
from tests.unit.score_protocol import PROTOCOL


def scored(images: int, values: dict[str, float], samples: int = 100, metric: str = "fd_x") -> ScoreRecord:
    """A record taken at time `images`."""
    protocol = PROTOCOL.model_copy(update={"samples": samples})
    score = Score.of(protocol, metric, metric != "fd_x", values)
    return ScoreRecord(checkpoint=f"{images:012d}", images=images, score=score, seconds=1.0, time_ms=images)


def test_scores_of_several_protocols_are_not_compared() -> None:
    old = scored(1, {"fd_x": 5.0}, samples=10)
    new, newest = scored(2, {"fd_x": 50.0}, samples=20), scored(3, {"fd_x": 60.0}, samples=20)
    assert best_score([old, new, newest]) == new
    assert best_score([]) is None


def test_the_metric_of_the_last_score_ranks_all_of_them() -> None:
    old, last = scored(1, {"fd_x": 5.0, "isc_x": 2.0}), scored(2, {"fd_x": 3.0, "isc_x": 1.0}, metric="isc_x")
    best = best_score([old, last])
    assert best is not None
    assert (best.checkpoint, best.score.metric, best.score.value) == (old.checkpoint, "isc_x", 2.0)


def test_the_later_one_of_two_equal_scores_is_the_best() -> None:
    first, second = scored(1, {"fd_x": 5.0}), scored(2, {"fd_x": 5.0})
    assert best_score([second, first]) == second


def test_a_record_without_values_is_never_the_best() -> None:
    broken, sound = scored(2, {}), scored(1, {"fd_x": 5.0})
    assert best_score([broken]) is None
    assert best_score([sound, broken]) == sound
