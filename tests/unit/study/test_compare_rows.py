"""The tables of a study: what is in one column, how rows are paired, and what is said about published values."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from pipeline.config.schema import StudyJob
from pipeline.runs.json_records import StudyTable
from pipeline.runs.score_protocol import Score
from pipeline.runs.spending import Spending
from pipeline.study.compare_rows import Outcome, tables_of
from pipeline.study.show_tables import COLUMNS, as_csv, as_text, cells, head
from tests.unit.score_protocol import PROTOCOL

OTHER = PROTOCOL.model_copy(update={"samples": PROTOCOL.samples + 1})
PAPER = {"source": "Zhang et al. 2019, table 1", "protocol": "50 000 images"}


def study(rows: dict[str, Any], **compare: Any) -> StudyJob:
    return StudyJob(
        name="s",
        base="base.yaml",
        seeds=[0, 1, 2],
        rows=rows,
        compare={"metrics": ["fid"], "reference": "none", **compare},
    )


def outcome(row: str, seed: int, fid: float | None, *, protocol=PROTOCOL, diverged: bool = False) -> Outcome:
    score = None if fid is None else Score.of(protocol, "fid", False, {"fid": fid, "isc": 10 * fid})
    return Outcome(row, seed, score, diverged)


def tables(job: StudyJob, *outcomes: Outcome) -> list[StudyTable]:
    return tables_of(job, outcomes, {"fid": False, "isc": True})


def test_means_deviations_and_differences_between_runs_of_one_seed() -> None:
    job = study({"none": {}, "feat32": {}})
    values = {"none": (20.0, 30.0, 40.0), "feat32": (19.0, 28.0, 40.0)}
    (table,) = tables(job, *(outcome(row, seed, v) for row, of_row in values.items() for seed, v in enumerate(of_row)))
    none, feat32 = table.rows
    assert (none.mean, none.deviation, none.difference, none.pairs) == (30.0, 10.0, None, 0)
    assert feat32.mean == 29.0
    assert (feat32.difference, feat32.pairs) == (-1.0, 3)
    assert feat32.difference_interval is not None
    assert (feat32.difference_interval.low, feat32.difference_interval.high) == (-2.0, 0.0)
    assert none.interval is not None
    assert (none.interval.low, none.interval.high) == (20.0, 40.0), "seeds differ more than rows do"


def test_a_seed_that_only_one_row_has_is_in_its_mean_and_not_in_the_difference() -> None:
    (table,) = tables(
        study({"none": {}, "b": {}}), outcome("none", 0, 10.0), outcome("b", 0, 11.0), outcome("b", 1, 99.0)
    )
    none, b = table.rows
    assert (b.mean, b.difference, b.pairs, b.difference_interval) == (55.0, 1.0, 1, None)
    assert (none.deviation, none.interval) == (None, None)


def test_scores_under_different_protocols_are_never_in_one_table() -> None:
    job = study({"none": {}, "b": {}})
    found = tables(
        job,
        outcome("none", 0, 10.0),
        outcome("b", 0, 11.0),
        outcome("none", 1, 20.0),
        outcome("b", 1, 9.0, protocol=OTHER),
    )
    assert {table.protocol.id8: {row.row: row.values for row in table.rows} for table in found} == {
        PROTOCOL.id8: {"none": {"0": 10.0, "1": 20.0}, "b": {"0": 11.0}},
        OTHER.id8: {"b": {"1": 9.0}},
    }
    assert [row.difference for table in found for row in table.rows] == [None, 1.0, None]


def test_each_metric_has_a_table_with_its_direction() -> None:
    fid, isc = tables(study({"none": {}}, metrics=["fid", "isc"]), outcome("none", 0, 10.0))
    assert (fid.key, fid.higher_is_better, fid.rows[0].mean) == (f"fid/{PROTOCOL.id8}", False, 10.0)
    assert (isc.key, isc.higher_is_better, isc.rows[0].mean) == (f"isc/{PROTOCOL.id8}", True, 100.0)


def test_a_row_of_which_all_runs_diverged_is_in_the_table() -> None:
    job = study({"none": {}, "d-only": {}})
    diverged = [outcome("d-only", seed, None, diverged=True) for seed in range(2)]
    (table,) = tables(job, outcome("none", 0, 10.0), *diverged)
    row = table.rows[1]
    assert (row.row, row.values, row.diverged, row.mean, row.difference) == ("d-only", {}, 2, None, None)
    assert cells(row)[:3] == ["d-only", "0, 2 diverged", "–"]


def test_a_row_has_the_device_hours_and_the_cost_of_all_its_runs() -> None:
    spent = [Outcome("none", seed, None, seed == 1, Spending.of(1.5, 0, None, 2.0)) for seed in range(2)]
    (table,) = tables(study({"none": {}, "other": {}}), *spent, outcome("other", 0, 10.0))
    row, other = table.rows
    assert (row.device_hours, row.cost) == (3.0, 6.0)
    assert cells(row)[-2:] == ["3.00", "6.00"]
    assert cells(other)[-2:] == ["0", "–"], "no driver has said anything of it"
    assert [line["cost"] for line in csv.DictReader(io.StringIO(as_csv([table])))] == ["6.0", ""]


def test_values_that_are_not_finite_are_no_scores() -> None:
    (table,) = tables(study({"none": {}}), outcome("none", 0, 10.0), outcome("none", 1, float("nan")))
    assert table.rows[0].values == {"0": 10.0}


@pytest.mark.parametrize(
    ("published", "held", "difference", "difference_held"),
    [
        ({"value": 18.28, **PAPER}, True, -4.0, True),
        ({"value": 25.0, **PAPER}, False, pytest.approx(2.72), False),
        ({"value": 18.28, **PAPER, "protocol": "10 000 images"}, True, None, None),
        ({"value": 18.28, **PAPER, "source": "someone else"}, True, None, None),
    ],
)
def test_published_values_are_compared_with_the_intervals_and_with_their_own_kind(
    published: dict[str, Any], held: bool, difference: Any, difference_held: bool | None
) -> None:
    reference = {"published": [{"metric": "fid", "value": 22.28, **PAPER}]}
    job = study({"none": reference, "feat32": {"published": [{"metric": "fid", **published}]}})
    ours = [(outcome("none", s, 22.0 + s), outcome("feat32", s, 18.0 + s - 0.25 * s)) for s in range(3)]
    (table,) = tables(job, *(one for pair in ours for one in pair))
    value = table.rows[1].published
    assert value is not None
    assert (value.held, value.difference, value.difference_held) == (held, difference, difference_held)
    assert table.rows[0].published is not None
    assert table.rows[0].published.difference is None, "the reference row has no difference to itself"


def test_one_seed_holds_no_published_value() -> None:
    job = study({"none": {"published": [{"metric": "fid", "value": 22.96, **PAPER}]}})
    (table,) = tables(job, outcome("none", 0, 22.96))
    assert table.rows[0].published is not None
    assert table.rows[0].published.held is None


def test_the_text_and_the_csv_have_every_row_with_its_source() -> None:
    job = study({"none": {"published": [{"metric": "fid", "value": 22.96, **PAPER}]}, "feat32": {}})
    found = tables(job, *(outcome(row, seed, 20.0 + seed) for row in job.rows for seed in range(3)))
    lines = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert tuple(lines[0]) == COLUMNS
    assert [(line["row"], line["n"], line["mean"], line["published"]) for line in lines] == [
        ("none", "3", "21.0", "22.96"),
        ("feat32", "3", "21.0", ""),
    ]
    assert lines[1]["difference"] == lines[1]["difference_low"] == "0.0"
    text = as_text(found)
    assert f"fid/{PROTOCOL.id8}" in text
    assert "22.96, out" in text
    assert "none: 22.96, Zhang et al. 2019, table 1; 50 000 images" in " ".join(text.split())
    assert all(len(cells(row)) == len(head(table)) for table in found for row in table.rows)


def test_markup_and_control_characters_of_a_source_are_text() -> None:
    source = {"metric": "fid", "value": 1.0, "source": "[red]\x1b[31m", "protocol": "p"}
    text = as_text(tables(study({"none": {"published": [source]}}), outcome("none", 0, 1.0)))
    assert "[red]" in text
    assert "\x1b" not in text
