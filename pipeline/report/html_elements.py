"""Elements of the page: text, tables, pictures and curves, as HTML that loads nothing from a network."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

EXACT = 64  # largest number of pixels per side of an image that is stored without loss, if it fits the budget
# (quality, reduction) of WebP. The first one that fits is used. A reduction of r keeps one of r pixels per side.
FORMS = ((90, 1), (75, 1), (60, 1), (45, 1), (30, 1), (30, 2), (30, 4), (30, 8))


class Html(str):
    """Text that is HTML already. All other text is escaped when it becomes part of an element."""


def of(value: object) -> Html:
    """Return a value as HTML: floats with four digits, a dash for None, and other values as escaped text."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("–")
    return Html(html.escape(f"{value:.4g}" if isinstance(value, float) else str(value)))


def element(name: str, *content: object, **attributes: object) -> Html:
    """Return an element with content and attributes.

    The attribute `class_` is written as `class`. Other underscores are written as hyphens. The value True writes an
    attribute without a value. The values None and False write no attribute.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{written}>{joined(content)}</{name}>")


def joined(parts: Iterable[object]) -> Html:
    """Return the parts one after another."""
    return Html("".join(of(part) for part in parts))


class Section(NamedTuple):
    """A section of the page. A section without content is left out."""

    title: str
    content: Html


def side_by_side(columns: Sequence[tuple[str, Html]]) -> Html:
    """Return columns of (name, content). A narrow screen shows them below each other.

    A single column is shown without its name.
    """
    if len(columns) < 2:
        return joined(content for _, content in columns)
    return element(
        "div", *(element("div", element("h3", name), content) for name, content in columns), class_="columns"
    )


def table(head: Sequence[object], rows: Iterable[Sequence[object]], caption: str = "") -> Html:
    """Return a table. The first cell of each row is the header of the row.

    On a narrow screen the table scrolls separately from the page.
    """
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    top = element("thead", element("tr", *(element("th", cell, scope="col") for cell in head)))
    inside = element("table", element("caption", caption) if caption else "", top, element("tbody", *body))
    return element("div", inside, class_="scroll", tabindex=0, role="group", aria_label=caption or "table")


def data_uri(image: Image.Image | Tensor, budget: int) -> str:
    """Return an image as a data URI of at most `budget` characters, without loss or with the best quality that fits.

    Even noise of 960 × 3 840 px fits into 2 000 characters.

    Args:
        image: An image, or uint8 [3, H, W].
        budget: Largest number of characters.
    """
    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    written = _webp(image, lossless=True) if max(image.size) <= EXACT else ""
    for quality, step in FORMS:
        if written and len(written) <= budget:
            break
        written = _webp(image if step == 1 else image.reduce(step), quality=quality)
    return written


def _webp(image: Image.Image, **how: Any) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", **how)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(image: Image.Image | Tensor, alt: str, budget: int, **attributes: object) -> Html:
    """Return an `img` element. Its data URI has at most `budget` characters (`data_uri`)."""
    written = element("img", src=data_uri(image, budget), alt=alt, **attributes)
    return Html(written.removesuffix("</img>"))


def tiles(title: str, images: Tensor, captions: Sequence[str], budget: int, *, show_captions: bool = True) -> Html:
    """Return a row of images.

    Args:
        title: Title of the row; "" for none.
        images: uint8 [n, 3, H, W].
        captions: Caption of each image. It is the alternative text of the image.
        budget: Largest number of characters of each image.
        show_captions: Whether captions are shown below the images.
    """
    figures = [
        element(
            "figure",
            picture(image, caption, budget, class_="pixels"),
            element("figcaption", caption) if show_captions else "",
        )
        for image, caption in zip(images, captions, strict=True)
    ]
    row = element("div", *figures, class_="tiles", style=f"--tiles: {len(figures)}")
    return element("div", element("h4", title) if title else "", row)


def data(value: Any, **attributes: object) -> Html:
    """Return a `script` element with the value as JSON, for the page's script."""
    written = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return element("script", Html(written), type="application/json", **attributes)


def whole(title: str, sections: Sequence[Section]) -> str:
    """Return the text of the page. The page loads no other file."""
    here = Path(__file__)
    filled = [section for section in sections if section.content]
    links = [element("a", part.title, href=f"#part{i}") for i, part in enumerate(filled)]
    body = [element("section", element("h2", part.title), part.content, id=f"part{i}") for i, part in enumerate(filled)]
    template = Template(here.with_name("page.html").read_text())
    script = here.with_name("page.js").read_text()
    nav = element("nav", *links, aria_label="sections of the page")
    return template.substitute(title=html.escape(title), nav=nav, body=joined(body), script=script)
