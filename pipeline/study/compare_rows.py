"""The tables of a study: a table for each metric and score protocol, with the rows that have scores under it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.schema import CompareSection, Published, StudyJob
from pipeline.runs.json_records import Interval, PublishedValue, StudyRowResult, StudyTable
from pipeline.runs.score_protocol import Score, ScoreProtocol
from pipeline.runs.spending import Spending
from pipeline.study.bootstrap import mean_interval

Values = dict[int, float]
"""A value for each seed."""


@dataclass(frozen=True)
class Outcome:
    """What a run of a study came to. `score` is None where the run has no score that is finite."""

    row: str
    seed: int
    score: Score | None
    diverged: bool = False
    spending: Spending | None = None


def tables_of(study: StudyJob, outcomes: Sequence[Outcome], higher_is_better: Mapping[str, bool]) -> list[StudyTable]:
    """Return the tables of a study.

    Scores under different protocols are in different tables. A row is in each table under whose protocol it has scores.
    A row without any score is in all tables, without values.

    Args:
        study: The study.
        outcomes: At most one outcome for each row and seed.
        higher_is_better: Direction of each metric of the study.
    """
    scored = {outcome.row for outcome in outcomes if outcome.score is not None}
    tables = []
    for metric in study.compare.metrics:
        by_protocol: dict[str, tuple[ScoreProtocol, dict[str, Values]]] = {}
        for outcome in outcomes:
            value = outcome.score.values.get(metric, math.nan) if outcome.score else math.nan
            if outcome.score and math.isfinite(value):
                protocol = outcome.score.protocol
                _, values = by_protocol.setdefault(protocol.id8, (protocol, {row: {} for row in study.rows}))
                values[outcome.row][outcome.seed] = value
        for protocol, values in by_protocol.values():
            shown = {row: of_row for row, of_row in values.items() if of_row or row not in scored}
            tables.append(
                StudyTable(
                    metric=metric,
                    protocol=protocol,
                    higher_is_better=higher_is_better[metric],
                    reference=study.compare.reference,
                    score=study.compare.score,
                    confidence=study.compare.confidence,
                    rows=_results(study, metric, shown, outcomes),
                )
            )
    return tables


def _results(
    study: StudyJob, metric: str, values: Mapping[str, Values], outcomes: Sequence[Outcome]
) -> list[StudyRowResult]:
    """Return the rows of one table, in the order of `values`."""
    compare = study.compare
    published = {row: value for row, given in study.rows.items() for value in given.published if value.metric == metric}
    results = []
    for row, of_row in values.items():
        spending = Spending.total(outcome.spending for outcome in outcomes if outcome.row == row)
        theirs = {} if row == compare.reference else values.get(compare.reference, {})
        differences = [value - theirs[seed] for seed, value in of_row.items() if seed in theirs]
        interval = mean_interval(list(of_row.values()), compare.confidence)
        difference_interval = mean_interval(differences, compare.confidence)
        results.append(
            StudyRowResult(
                row=row,
                values={str(seed): value for seed, value in of_row.items()},
                diverged=sum(o.diverged and o.score is None for o in outcomes if o.row == row),
                mean=statistics.fmean(of_row.values()) if of_row else None,
                deviation=statistics.stdev(of_row.values()) if len(of_row) > 1 else None,
                interval=interval,
                difference=statistics.fmean(differences) if differences else None,
                pairs=len(differences),
                difference_interval=difference_interval,
                published=_published(row, published, compare, interval, difference_interval),
                device_hours=spending.device_hours,
                cost=spending.cost,
            )
        )
    return results


def _published(
    row: str,
    published: Mapping[str, Published],
    compare: CompareSection,
    interval: Interval | None,
    difference_interval: Interval | None,
) -> PublishedValue | None:
    """Return the published value of a row, and what the row's intervals say about it; None where none is published."""
    ours, theirs = published.get(row), published.get(compare.reference)
    if ours is None:
        return None
    difference = None
    comparable = theirs is not None and (ours.source, ours.protocol) == (theirs.source, theirs.protocol)
    if theirs is not None and comparable and row != compare.reference:
        difference = ours.value - theirs.value
    return PublishedValue(
        value=ours.value,
        source=ours.source,
        protocol=ours.protocol,
        held=interval.holds(ours.value) if interval else None,
        difference=difference,
        difference_held=(
            difference_interval.holds(difference) if difference is not None and difference_interval else None
        ),
    )
