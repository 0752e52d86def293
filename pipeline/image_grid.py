"""Pictures that show many images: a labelled grid, and two grids side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.storage.validate_json import printable

LEAST_TILE = 64  # least pixels per side; smaller images are enlarged by an integer factor
GAP, MARGIN, TEXT = 4, 16, 15
INK, PAPER, FAINT = (32, 32, 32), (255, 255, 255), (110, 110, 110)


def grid(images: Tensor, labels: Sequence[str] | None = None, columns: int = 8, title: str = "") -> Image.Image:
    """Draw images in rows of `columns`, below a title line.

    Where all images of every row have the same label, the label is written once, at the left of the row. Otherwise
    each image has its label below it.

    Args:
        images: uint8 [n, 3, H, W], n ≥ 1.
        labels: One text per image.
        columns: Images per row.
        title: Text above the grid.

    Letters that cannot be printed are escaped.
    """
    title, labels = printable(title), None if labels is None else [printable(label) for label in labels]
    # Pillow's own font has only Latin letters; matplotlib's font also has Greek, Cyrillic, Arabic and others.
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), TEXT)
    factor = max(1, -(-LEAST_TILE // images.shape[-1]))
    width, height = images.shape[-1] * factor, images.shape[-2] * factor
    columns = min(columns, len(images))
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    by_row = labels is not None and all(len({labels[i] for i in row}) == 1 for row in rows)
    left = max(round(font.getlength(labels[row[0]])) for row in rows) + 2 * GAP if labels and by_row else 0
    below = TEXT + 2 * GAP if labels and not by_row else 0
    above = TEXT + MARGIN if title else 0
    content = max(left + columns * (width + GAP), round(font.getlength(title)))
    page = Image.new("RGB", (2 * MARGIN + content, 2 * MARGIN + above + len(rows) * (height + below + GAP)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, font)
    for r, row in enumerate(rows):
        top = MARGIN + above + r * (height + below + GAP)
        if labels and by_row:
            draw.text((MARGIN, top + height / 2), labels[row[0]], INK, font, anchor="lm")
        for c, i in enumerate(row):
            x = MARGIN + left + c * (width + GAP)
            tile = Image.fromarray(images[i].permute(1, 2, 0).cpu().numpy())
            page.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x, top))
            if labels and not by_row:
                draw.text((x, top + height + GAP), _fitting(labels[i], width, font), FAINT, font)
    return page


def beside_real(
    generated: Tensor, real: Tensor, labels: Sequence[str] | None = None, columns: int = 8, title: str = ""
) -> Image.Image:
    """Draw a grid of generated images and, at its right, a grid of as many real images with the same labels."""
    left = grid(generated, labels, columns, f"generated{title and ' · '}{title}")
    right = grid(real, labels, columns, "real")
    page = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), PAPER)
    page.paste(left, (0, 0))
    page.paste(right, (left.width, 0))
    return page


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return `text`, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
