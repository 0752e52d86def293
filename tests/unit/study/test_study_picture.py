"""The picture of a study: a curve for each row, apart for each metric and protocol."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from pipeline.runs.json_records import ScoreRecord
from pipeline.runs.score_protocol import Score
from pipeline.study.study_picture import curves_of, draw_curves
from tests.unit.score_protocol import PROTOCOL, ScoreProtocol

OTHER = PROTOCOL.model_copy(update={"seed": 1})


def record(images: int, values: dict[str, float], protocol: ScoreProtocol = PROTOCOL) -> ScoreRecord:
    score = Score.of(protocol, "fid", False, values)
    return ScoreRecord(checkpoint=f"{images:012d}", images=images, score=score, seconds=1.0, time_ms=images)


def test_curves_collect_the_runs_of_a_row_and_keep_metrics_and_protocols_apart() -> None:
    scores = {
        "none": [record(1000, {"fid": 30.0, "isc": 2.0}), record(2000, {"fid": 20.0}), record(1000, {"fid": 34.0})],
        "feat32": [record(1000, {"fid": 9.0}, OTHER), record(1000, {}), record(2000, {"fid": float("nan")})],
    }
    assert curves_of(scores, ["fid"]) == {
        PROTOCOL.key("fid"): {"none": {1000: [30.0, 34.0], 2000: [20.0]}},
        OTHER.key("fid"): {"feat32": {1000: [9.0]}},
    }


def test_the_picture_has_a_plot_for_each_metric_and_protocol(tmp_path: Path) -> None:
    one = {"none": {1000: [30.0, 34.0], 2000: [20.0]}, "feat32": {1000: [9.0]}}
    sizes = []
    for count in (1, 2):
        draw_curves({f"fid/{i}": one for i in range(count)}, tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as picture:
            sizes.append(picture.size)
    assert sizes[1] == (sizes[0][0], 2 * sizes[0][1])
