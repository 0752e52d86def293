"""The score over the plane of two keys, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(
    trials: Sequence[tuple[Mapping[str, Any], float, float]],
    marked: Sequence[Mapping[str, Any]],
    score_name: str,
    out: Path,
) -> None:
    """Write a PNG: each trial (point, score, kimg) at its first two keys, coloured by score, larger the longer it ran;
    `marked` points (the published pairs) are ringed. With one key the score itself is the vertical axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(trials[0][0])[:2]
    xs = [float(point[names[0]]) for point, _, _ in trials]
    scores = [score for _, score, _ in trials]
    ys = [float(point[names[1]]) for point, _, _ in trials] if len(names) > 1 else scores
    longest = max(kimg for _, _, kimg in trials)
    sizes = [40 + 160 * kimg / longest for _, _, kimg in trials]
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    points = axes.scatter(xs, ys, c=scores, s=sizes, cmap="viridis_r", edgecolors="black", linewidths=0.5, zorder=3)
    for x, y, score in zip(xs, ys, scores, strict=True):
        axes.annotate(f"{score:.3g}", (x, y), textcoords="offset points", xytext=(9, 3), fontsize=8)
    for point in marked:
        if len(names) > 1 and all(name in point for name in names):
            where = (float(point[names[0]]), float(point[names[1]]))
            axes.scatter(*where, s=420, facecolors="none", edgecolors="tab:red", linewidths=1.5, zorder=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1] if len(names) > 1 else score_name)
    axes.set_title(f"{score_name} (size: kimg, ring: tried first)")
    axes.grid(alpha=0.3, which="both")
    axes.margins(0.15)
    figure.colorbar(points, label=score_name)
    figure.savefig(out, dpi=120)
    plt.close(figure)
