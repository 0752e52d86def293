"""A picture of the scores of a study over the length of its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.runs.json_records import ScoreRecord

Curves = dict[str, dict[int, list[float]]]
"""By name of a row: the values of its runs at each position in images."""


def curves_of(scores: Mapping[str, Sequence[ScoreRecord]], metrics: Sequence[str]) -> dict[str, Curves]:
    """Return the curves of each metric and protocol, by a name such as `fid/3fa9c1d2`.

    Args:
        scores: Scores of all runs of each row, by name of the row.
        metrics: Names of the metrics.
    """
    curves: dict[str, Curves] = {}
    for metric in metrics:
        for row, records in scores.items():
            for record in records:
                value = record.score.values.get(metric)
                if value is not None and math.isfinite(value):
                    of_row = curves.setdefault(record.score.protocol.key(metric), {}).setdefault(row, {})
                    of_row.setdefault(record.images, []).append(value)
    return curves


def draw_curves(curves: Mapping[str, Curves], out: Path) -> None:
    """Write a PNG with a plot for each metric and protocol.

    A line is the mean over the runs of a row that have a score at a position. Its band reaches from the least to the
    greatest of these scores.

    Args:
        curves: Curves by name of metric and protocol, at least one.
        out: File to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, plots = plt.subplots(
        len(curves), squeeze=False, figsize=(8, 4.2 * len(curves)), layout="constrained", sharex=False
    )
    for axes, (name, rows) in zip(plots[:, 0], curves.items(), strict=True):
        for i, (row, values) in enumerate(rows.items()):
            positions = sorted(values)
            kimg = [images / 1000 for images in positions]
            runs = max(len(of_position) for of_position in values.values())
            style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--", "marker": "o", "markersize": 3}
            axes.plot(kimg, [statistics.fmean(values[at]) for at in positions], label=f"{row} ({runs})", **style)
            low, high = ([end(values[at]) for at in positions] for end in (min, max))
            axes.fill_between(kimg, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel("kimg")
        axes.set_ylabel(name)
        axes.set_title("mean over the runs (number), and band from the least to the greatest", fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(out, dpi=120)
    plt.close(figure)
