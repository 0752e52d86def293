from __future__ import annotations

import pytest

from pipeline.runs.score_protocol import Score, ScoreProtocol, better_first, comparable

PROTOCOL = ScoreProtocol(
    extractor="inception",
    extractor_digest="ab" * 32,
    resize="tf1-bilinear-299",
    reference_digest="cd" * 32,
    split="train",
    samples=50_000,
    seed=0,
    weights="ema",
    batch_norm="standing 4096",
)


@pytest.mark.parametrize("field", list(ScoreProtocol.model_fields))
def test_every_part_of_a_protocol_is_part_of_its_name(field: str) -> None:
    value = getattr(PROTOCOL, field)
    changed = PROTOCOL.to_dict() | {field: value + 1 if isinstance(value, int) else value + "x"}
    other = ScoreProtocol(**changed)
    assert other.key("fid") != PROTOCOL.key("fid")


def test_the_same_protocol_has_the_same_name_wherever_it_is_computed() -> None:
    assert PROTOCOL.key("fid") == "fid/fc9ba58f"


def test_a_protocol_survives_a_round_trip_through_its_values() -> None:
    assert ScoreProtocol(**PROTOCOL.to_dict()) == PROTOCOL


def test_a_score_has_the_value_of_its_metric_under_its_protocol() -> None:
    values, deviations = {"fid": 12.5, "isc": 8.0}, {"fid": 0.5, "isc": 0.1}
    score = Score.of(PROTOCOL, "fid", False, values, deviations)
    assert (score.value, score.deviation, score.key) == (12.5, 0.5, PROTOCOL.key("fid"))
    assert Score.of(PROTOCOL, "fid", False, values).deviation is None


def test_a_score_without_values_has_no_value() -> None:
    assert Score.of(PROTOCOL, "fid", False, {}).value is None


@pytest.mark.parametrize(("metric", "higher", "best"), [("fid", False, 1.0), ("isc", True, 3.0)])
def test_scores_sort_best_first_in_the_direction_of_their_metric(metric: str, higher: bool, best: float) -> None:
    scores = [Score.of(PROTOCOL, metric, higher, {metric: value}) for value in (2.0, 1.0, 3.0)]
    assert min(scores, key=better_first).value == best


def test_scores_compare_under_one_protocol_and_metric() -> None:
    other = PROTOCOL.model_copy(update={"samples": 100})
    ranked_by_isc = Score.of(PROTOCOL, "isc", True, {"fid": 3.0, "isc": 8.0})
    without_fid = Score.of(PROTOCOL, "isc", True, {"isc": 9.0})
    elsewhere = Score.of(other, "fid", False, {"fid": 1.0})
    last = Score.of(PROTOCOL, "fid", False, {"fid": 4.0})
    found = comparable([ranked_by_isc, without_fid, elsewhere, last], last)
    assert [(score.metric, score.value, score.higher_is_better) for score in found] == [
        ("fid", 3.0, False),
        ("fid", 4.0, False),
    ]
