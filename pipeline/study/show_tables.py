"""The tables of a study as text and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from pipeline.errors import printable
from pipeline.runs.json_records import Interval, StudyRowResult, StudyTable
from pipeline.runs.spending import shown_amount

NONE = "–"
_WIDTH = 170

COLUMNS = (
    "metric",
    "protocol",
    "score",
    "row",
    "n",
    "diverged",
    "mean",
    "deviation",
    "low",
    "high",
    "reference",
    "pairs",
    "difference",
    "difference_low",
    "difference_high",
    "published",
    "published_held",
    "published_difference",
    "published_difference_held",
    "source",
    "published_protocol",
    "device_hours",
    "cost",
)
"""Columns of the CSV file."""


def as_csv(tables: Sequence[StudyTable]) -> str:
    """Return all tables as one CSV text with a line for each row of a table. An absent value is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        for row in table.rows:
            published = row.published
            ends, of_difference = row.interval, row.difference_interval
            writer.writerow(
                {
                    "metric": table.metric,
                    "protocol": table.protocol.id8,
                    "score": table.score,
                    "row": row.row,
                    "n": len(row.values),
                    "diverged": row.diverged,
                    "mean": row.mean,
                    "deviation": row.deviation,
                    "low": ends and ends.low,
                    "high": ends and ends.high,
                    "reference": table.reference,
                    "pairs": row.pairs,
                    "difference": row.difference,
                    "difference_low": of_difference and of_difference.low,
                    "difference_high": of_difference and of_difference.high,
                    "published": published and published.value,
                    "published_held": published and published.held,
                    "published_difference": published and published.difference,
                    "published_difference_held": published and published.difference_held,
                    "source": published and published.source,
                    "published_protocol": published and published.protocol,
                    "device_hours": row.device_hours,
                    "cost": row.cost,
                }
            )
    return text.getvalue()


def as_text(tables: Sequence[StudyTable]) -> str:
    """Return the tables as text for people."""
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH)
    _print(tables, console)
    return text.getvalue()


def print_tables(tables: Sequence[StudyTable]) -> None:
    """Print the tables to stdout."""
    _print(tables, Console(width=_WIDTH))


def head(table: StudyTable) -> list[str]:
    """Return the titles of the columns for people."""
    interval = f"{table.confidence * 100:g} % interval"
    difference, costs = f"minus {table.reference}", ["device hours", "cost"]
    return ["row", "n", "mean", "sd", interval, "published", difference, interval, "published", *costs]


def cells(row: StudyRowResult) -> list[str]:
    """Return the values of one row for people, one for each title of `head`."""
    published, n = row.published, len(row.values)
    return [
        row.row,
        f"{n}, {row.diverged} diverged" if row.diverged else str(n),
        _number(row.mean),
        _number(row.deviation),
        _interval(row.interval),
        _held(published.value, published.held) if published else NONE,
        _number(row.difference, "+"),
        _interval(row.difference_interval, "+"),
        _held(published.difference, published.difference_held, "+") if published else NONE,
        shown_amount(row.device_hours),
        NONE if row.cost is None else shown_amount(row.cost),
    ]


def notes(table: StudyTable) -> list[str]:
    """Return what a reader of a table must know, one sentence or source each."""
    better = "higher" if table.higher_is_better else "lower"
    of_run = {
        "final": "the final score of each run's best checkpoint",
        "best": "each run's best score during training",
        "last": "the score at the end of each run",
    }[table.score]
    lines = [
        f"The values are {of_run}; {better} is better. sd is the sample standard deviation over the seeds. "
        "The intervals are percentile bootstrap intervals over the seeds, for the difference over pairs with equal "
        "seeds. With three seeds or fewer they are too narrow.",
    ]
    published = [(row.row, row.published) for row in table.rows if row.published is not None]
    if published:
        lines.append(
            "A published value has a protocol of its own, so its distance to ours is not only the method's. in: the "
            "interval to its left holds it; out: it does not."
        )
    lines += [f"{row}: {value.value:g}, {value.source}; {value.protocol}" for row, value in published]
    return lines


def _print(tables: Sequence[StudyTable], console: Console) -> None:
    for part in _parts(tables):
        console.print(part)


def _parts(tables: Sequence[StudyTable]) -> Iterator[RenderableType]:
    for table in tables:
        shown = Table(title=escape(printable(table.key)), title_justify="left")
        for title in head(table):
            shown.add_column(title, justify="left" if title == "row" else "right")
        for row in table.rows:
            shown.add_row(*(escape(printable(cell)) for cell in cells(row)))
        yield shown
        yield from (escape(printable(line)) for line in notes(table))


def _number(value: float | None, sign: str = "") -> str:
    return NONE if value is None else f"{value:{sign}.4g}"


def _interval(interval: Interval | None, sign: str = "") -> str:
    return NONE if interval is None else f"{interval.low:{sign}.4g} to {interval.high:{sign}.4g}"


def _held(value: float | None, held: bool | None, sign: str = "") -> str:
    """Return a published value, and whether the interval to its left holds it."""
    if value is None:
        return NONE
    return f"{value:{sign}g}" + ("" if held is None else ", in" if held else ", out")
