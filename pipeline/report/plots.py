"""Plots of the page, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.report.html_elements import Html, element

COLOURS = ("#1f6feb", "#c2410c")  # colours of the two runs in a plot


def curve(lines: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str) -> Html:
    """Return an SVG plot of at most two lines. Two lines get a legend.

    Args:
        lines: Points (x, y) of each line by its name.
        x_name: Name of the horizontal axis.
        y_name: Name of the vertical axis.
    """
    points = [point for line in lines.values() for point in line]
    (left, right), (low, high) = (_range([p[i] for p in points]) for i in (0, 1))
    width, height, margin, above, below = 400, 220, 60, 34, 30

    def at(x: float, y: float) -> tuple[float, float]:
        across = margin + (x - left) / (right - left) * (width - margin - 10)
        return round(across, 1), round(height - below - (y - low) / (high - low) * (height - below - above), 1)

    parts: list[Html] = [element("text", f"{y_name} over {x_name}", x=0, y=16, class_="name")]
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        x, y = left + share * (right - left), low + share * (high - low)
        across, down = at(x, y)
        parts.append(element("line", x1=margin, x2=width - 10, y1=down, y2=down, class_="rule"))
        parts.append(element("text", f"{y:.4g}", x=margin - 8, y=down + 5, text_anchor="end"))
        parts.append(element("text", f"{x:.4g}", x=across, y=height - 8, text_anchor=anchor))
    for colour, line in zip(COLOURS, lines.values(), strict=False):
        placed = [at(x, y) for x, y in line]
        path = " ".join(f"{x},{y}" for x, y in placed)
        parts.append(element("polyline", points=path, fill="none", stroke=colour, stroke_width=2))
        parts += [element("circle", cx=x, cy=y, r=3, fill=colour) for x, y in placed]
    values = "; ".join(f"{name}: {', '.join(f'{y:.4g} at {x:.4g}' for x, y in line)}" for name, line in lines.items())
    label = f"{y_name} over {x_name}. {values}"
    drawn = element("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label, class_="curve")
    names = [element("span", name, style=f"color: {c}") for name, c in zip(lines, COLOURS, strict=False)]
    return element("figure", drawn, element("figcaption", *names, class_="names") if len(names) > 1 else "")


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the least and the largest value, moved apart by 1 where all values are equal."""
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.5, high + 0.5)
