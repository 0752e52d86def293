"""The attention explorer: what explorer.js makes a place to point and look of, and pictures for those who only look."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from torch import Tensor

from pipeline.report import attention, page
from pipeline.report.attention import Layer
from pipeline.report.page import Html, element, joined


def explorer(layers: Sequence[Layer], images: Tensor, names: Sequence[str], budget: int) -> Html:
    """Explorer of as many of the images uint8 [n, 3, H, W], named, as fit into `budget` characters with their maps.

    Pictures get an eighth of it. Where one image's maps do not fit, all maps are kept on fewer cells.
    """
    room = budget * 7 // 8 // 4 * 3  # bytes, of which base64 makes a third more characters
    each = budget // 8 // (len(images) + len(layers))
    maps = _within(room, layers)
    count = min(len(images), room // _size(maps))
    explored = {
        "scale": {"full": attention.FULL, "even": attention.EVEN, "doubling": attention.DOUBLING},
        "layers": [
            {"title": layer.title, "queries": part.shape[1], "keys": part.shape[-1], "gamma": layer.gamma}
            for layer, part in zip(layers, maps, strict=True)
        ],
        "images": [
            {"name": names[i], "source": page.data_uri(images[i], each), "maps": [_base64(part[i]) for part in maps]}
            for i in range(count)
        ],
    }
    said = (
        "Choose an image, then a point of it, by pointing or with the arrow keys: colour shows where each layer "
        f"attends from there, in full from {attention.FULL:g} times an even share on."
    )
    root = element("div", page.data(explored), element("noscript", "Exploring needs scripts."), class_="explorer")
    return joined([element("p", said), root, *(_figure(layer, images[0], names[0], each) for layer in layers)])


def _within(room: int, layers: Sequence[Layer]) -> list[Tensor]:
    """Maps as bytes, on as many cells as leave room for those of one image."""
    queries, keys = attention.MOST_QUERIES, attention.MOST_KEYS
    while True:
        maps = [attention.quantised(attention.coarse(layer.maps, queries, keys)) for layer in layers]
        if _size(maps) <= room:
            return maps
        queries, keys = queries // 2, keys // 2


def _size(maps: Sequence[Tensor]) -> int:
    """Bytes of one image's."""
    return sum(part[0].numel() for part in maps)


def _figure(layer: Layer, image: Tensor, name: str, budget: int) -> Html:
    alt = f"{name}: five points in colour, then where the {layer.network} attends from each of them"
    picture = page.picture(attention.picture(image, layer.maps[0]), alt, budget)
    said = f"{layer.title}, γ = {layer.gamma:.3g}"
    shown = element("div", picture, class_="sideways", tabindex=0, role="group", aria_label=said)
    return element("figure", shown, element("figcaption", said), class_="wide")


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()
