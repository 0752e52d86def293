"""The attention explorer: data for page.js, and static pictures of the attention of every layer."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from torch import Tensor

from pipeline.report import attention_maps
from pipeline.report import html_elements as html
from pipeline.report.attention_maps import Layer
from pipeline.report.html_elements import Html, element, joined


def explorer(layers: Sequence[Layer], images: Tensor, names: Sequence[str], budget: int) -> Html:
    """Return an explorer of at most `budget` characters.

    Pictures get an eighth of the budget. Where the maps of all images do not fit into the rest, the last images are
    left out. Where the maps of a single image do not fit, all maps are reduced to fewer cells.

    Args:
        layers: Attention layers of the n images, in the order of the panels.
        images: uint8 [n, 3, H, W].
        names: Name of each image.
        budget: Largest number of characters.
    """
    room = budget * 7 // 8 // 4 * 3  # bytes of maps: base64 writes 3 bytes as 4 characters
    picture_budget = budget // 8 // (len(images) + len(layers))
    maps = _within(room, layers)
    count = min(len(images), room // _size(maps))
    explorer_data = {
        "scale": {"full": attention_maps.FULL, "even": attention_maps.EVEN, "doubling": attention_maps.DOUBLING},
        "layers": [
            {"title": layer.title, "queries": part.shape[1], "keys": part.shape[-1], "gamma": layer.gamma}
            for layer, part in zip(layers, maps, strict=True)
        ],
        "images": [
            {
                "name": names[i],
                "source": html.data_uri(images[i], picture_budget),
                "maps": [_base64(part[i]) for part in maps],
            }
            for i in range(count)
        ],
    }
    text = (
        "Choose an image. Then choose a point of the image with the mouse, with a finger or with the arrow keys. "
        "Colour shows where each layer attends from this point. A cell has full colour from "
        f"{attention_maps.FULL:g} times the uniform share."
    )
    noscript = element("noscript", "The explorer needs JavaScript.")
    root = element("div", html.data(explorer_data), noscript, class_="explorer")
    return joined(
        [element("p", text), root, *(_figure(layer, images[0], names[0], picture_budget) for layer in layers)]
    )


def _within(room: int, layers: Sequence[Layer]) -> list[Tensor]:
    """Return the maps of each layer, uint8 [n, Q, Q, K, K]. They have so few cells that one image fits `room` bytes."""
    queries, keys = attention_maps.MOST_QUERIES, attention_maps.MOST_KEYS
    while True:
        maps = [attention_maps.quantised(attention_maps.coarse(layer.maps, queries, keys)) for layer in layers]
        if _size(maps) <= room:
            return maps
        queries, keys = queries // 2, keys // 2


def _size(maps: Sequence[Tensor]) -> int:
    """Return the size of the maps of one image in bytes."""
    return sum(part[0].numel() for part in maps)


def _figure(layer: Layer, image: Tensor, name: str, budget: int) -> Html:
    """Return the attention of a layer from five points of the image, in at most about `budget` characters."""
    alt = f"{name}: the image with five coloured points, then the attention of the {layer.network} from each point"
    picture = html.picture(attention_maps.picture(image, layer.maps[0]), alt, budget)
    caption = f"{layer.title}, γ = {layer.gamma:.3g}"
    content = element("div", picture, class_="sideways", tabindex=0, role="group", aria_label=caption)
    return element("figure", content, element("figcaption", caption), class_="wide")


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()
