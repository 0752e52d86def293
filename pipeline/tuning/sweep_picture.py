"""A picture of the scores of a sweep over the plane of two keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.runs.json_records import Trial


def draw_plane(trials: Sequence[Trial], marked: Sequence[Mapping[str, Any]], score_name: str, out: Path) -> None:
    """Write a PNG of the trials that have a score.

    Each trial is a dot at its values of the first two keys of the space. The colour of the dot is the score, and its
    size is the length of the trial. With one key, the vertical axis is the score. An arrow leads from a trial to each
    of its clones.

    Args:
        trials: Trials, of which at least one has a score.
        marked: Points to mark with rings, for example published pairs.
        score_name: Name of the score.
        out: File to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    scored = [(trial, trial.score) for trial in trials if trial.score is not None]
    names = list(scored[0][0].point)[:2]
    scores = [score for _, score in scored]
    points = [trial.point for trial, _ in scored] + list(marked)
    axis = [_Axis([point[name] for point in points if name in point]) for name in names]
    xs = [axis[0].place(trial.point[names[0]]) for trial, _ in scored]
    ys = [axis[1].place(trial.point[names[1]]) for trial, _ in scored] if len(names) > 1 else scores
    longest = max(trial.kimg for trial, _ in scored)
    sizes = [40 + 160 * trial.kimg / longest for trial, _ in scored]
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    dots = axes.scatter(xs, ys, c=scores, s=sizes, cmap="viridis_r", edgecolors="black", linewidths=0.5, zorder=3)
    places = {trial.name: xy for (trial, _), xy in zip(scored, zip(xs, ys, strict=True), strict=True)}
    for trial, _ in scored:
        if trial.parent is not None and trial.parent.run in places:
            arrow = {"arrowstyle": "->", "color": "tab:gray", "shrinkA": 6, "shrinkB": 6}
            axes.annotate("", places[trial.name], places[trial.parent.run], arrowprops=arrow)
    for x, y, score in zip(xs, ys, scores, strict=True):
        axes.annotate(f"{score:.3g}", (x, y), textcoords="offset points", xytext=(9, 3), fontsize=8)
    for point in marked:
        if len(names) > 1 and all(name in point for name in names):
            x, y = (one.place(point[name]) for one, name in zip(axis, names, strict=True))
            axes.scatter(x, y, s=420, facecolors="none", edgecolors="tab:red", linewidths=1.5, zorder=4)
    axis[0].scale(axes.xaxis)
    (axis[1] if len(names) > 1 else _Axis(scores)).scale(axes.yaxis)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1] if len(names) > 1 else score_name)
    clones = ", arrow: clone" if any(trial.parent for trial in trials) else ""
    axes.set_title(f"{score_name} (size: kimg, ring: initial point{clones})")
    axes.grid(alpha=0.3, which="both")
    axes.margins(0.15)
    figure.colorbar(dots, label=score_name)
    figure.savefig(out, dpi=120)
    plt.close(figure)


class _Axis:
    """Where the values of one key are on an axis. Values that are no numbers have equal distances and labels."""

    def __init__(self, values: Sequence[Any]) -> None:
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        self._labels = None if numbers else list(dict.fromkeys(map(str, values)))
        self._log = numbers and all(value > 0 for value in values)

    def place(self, value: Any) -> float:
        return float(value) if self._labels is None else float(self._labels.index(str(value)))

    def scale(self, axis: Any) -> None:
        """Set the scale or the labels of one of matplotlib's axes."""
        if self._labels is not None:
            axis.set_ticks(range(len(self._labels)), self._labels, parse_math=False)
        elif self._log:
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
