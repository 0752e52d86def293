"""Attention maps of both networks, and pictures of these maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from pipeline.image_grid import GAP, PAPER
from sagan.attention import SelfAttention
from sagan.discriminator import Discriminator
from sagan.trained_model import Model

MOST_QUERIES, MOST_KEYS = 32, 16  # largest number of cells per side: at most 256 KiB per image and layer
FULL = 8.0  # a cell has full colour from this multiple of the uniform share
EVEN, DOUBLING = 69, 23  # `quantised` stores the uniform share as EVEN, and twice a share as DOUBLING more
PANEL = 128  # least number of pixels per side of a panel
COLOURS = [(214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189)]
PLACES = [(0.5, 0.5), (0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)]  # (down, across)


@dataclass(frozen=True)
class Layer:
    """Attention of one self-attention layer in n images.

    Attributes:
        network: "generator" or "discriminator".
        gamma: Factor of the layer's output. At 0 the layer has no effect.
        maps: float [n, Q, Q, K, K], the attention from each cell of a Q×Q grid over the image to each cell of a K×K
            grid over the same image. It sums to one over the last two axes. With pooled keys, K is Q / 2.
    """

    network: str
    gamma: float
    maps: Tensor

    @property
    def queries(self) -> int:
        """Q, the number of query cells per side."""
        return self.maps.shape[1]

    @property
    def keys(self) -> int:
        """K, the number of key cells per side."""
        return self.maps.shape[-1]

    @property
    def title(self) -> str:
        return f"{self.network}, {self.queries}×{self.queries}"


def of_generator(model: Model, z: Tensor, y: Tensor | None) -> list[Layer]:
    """Return the attention of the generator's layers while it generates n images.

    Args:
        model: The model.
        z: Latents, float32 [n, z_dim].
        y: Labels, int64 [n]; None without classes.

    Returns the layers in the order of the network.
    """
    weight = next(model.generator.parameters())
    return record_layers("generator", model.generator, z.to(weight), _to_device(weight, y))


def of_discriminator(discriminator: Discriminator, images: Tensor, y: Tensor | None) -> list[Layer]:
    """Return the attention of the discriminator's layers while it processes n images.

    Args:
        discriminator: The discriminator.
        images: uint8 [n, 3, H, W].
        y: Labels, int64 [n]; None without classes.

    Returns the layers in the order of the network.
    """
    weight = next(discriminator.parameters())
    return record_layers("discriminator", discriminator, images.to(weight) * (2 / 255) - 1, _to_device(weight, y))


@torch.inference_mode()
def record_layers(name: str, network: nn.Module, *inputs: Any) -> list[Layer]:
    """Call `network(*inputs)` and return the attention of its self-attention layers, in the order of the calls.

    `name` is the `network` attribute of the returned layers.
    """
    layers: list[Layer] = []

    def record(attention: nn.Module, arguments: tuple[Tensor]) -> None:
        assert isinstance(attention, SelfAttention)
        (x,) = arguments
        queries = x.shape[-1]
        keys = queries // 2 if attention.pooled else queries
        maps = attention.maps(x).unflatten(2, (keys, keys)).unflatten(1, (queries, queries))
        layers.append(Layer(name, attention.gamma.item(), maps.cpu()))

    hooks = [m.register_forward_pre_hook(record) for m in network.modules() if isinstance(m, SelfAttention)]
    try:
        network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def coarse(maps: Tensor, queries: int = MOST_QUERIES, keys: int = MOST_KEYS) -> Tensor:
    """Return maps [n, Q, Q, K, K] with at most `queries` query cells and `keys` key cells per side.

    A new cell has the mean over the query cells that it replaces, and the sum over the key cells that it replaces.
    """
    n, q, _, k, _ = maps.shape
    new_q, new_k = min(q, queries), min(k, keys)
    maps = maps.view(n, new_q, q // new_q, new_q, q // new_q, k, k).mean((2, 4))
    return maps.view(n, new_q, new_q, new_k, k // new_k, new_k, k // new_k).sum((4, 6))


def quantised(maps: Tensor) -> Tensor:
    """Return maps with at most 256 key cells as uint8.

    The value 69 is the uniform share. Each 23 more double the share. The value 0 is an eighth of the uniform share or
    less. The relative error of a share is at most 1.6 %, for flat maps and for sharp maps.
    """
    times_uniform = maps * maps[0, 0, 0].numel()
    return (EVEN + DOUBLING * times_uniform.log2()).round().clamp(0, 255).to(torch.uint8)


def overlaid(image: Tensor, attended: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """Draw an attention map over an image.

    Args:
        image: uint8 [3, S, S]. It is drawn in dim grey.
        attended: float [K, K], the map. S must be a multiple of K.
        colour: Colour of the cells. A cell with a larger share has a stronger colour.

    Returns uint8 [3, S, S].
    """
    grey = image.float().mean(0) * 0.6
    strength = 0.85 * (attended * attended.numel() / FULL).clamp(max=1)
    strength = strength.repeat_interleave(image.shape[-1] // len(attended), 0)
    strength = strength.repeat_interleave(image.shape[-1] // attended.shape[1], 1)
    return torch.stack([grey * (1 - strength) + c * strength for c in colour]).round().to(torch.uint8)


def picture(image: Tensor, maps: Tensor, places: Sequence[tuple[float, float]] = tuple(PLACES)) -> Image.Image:
    """Draw a row as in figure 1 of Zhang et al. 2019: the image with query points, then one map per query point.

    A point and its map have the same colour.

    Args:
        image: uint8 [3, S, S].
        maps: float [Q, Q, K, K].
        places: At most five query points (down, across), as shares of the image in [0, 1).
    """
    side = image.shape[-1] * max(1, PANEL // image.shape[-1])
    page = Image.new("RGB", ((1 + len(places)) * (side + GAP) - GAP, side), PAPER)

    def paste(panel: Tensor, column: int) -> None:
        tile = Image.fromarray(panel.permute(1, 2, 0).cpu().numpy())
        page.paste(tile.resize((side, side), Image.Resampling.NEAREST), (column * (side + GAP), 0))

    paste(image, 0)
    draw, queries = ImageDraw.Draw(page), len(maps)
    cell = side // queries
    for column, (place, colour) in enumerate(zip(places, COLOURS, strict=False), start=1):
        row, across = (int(share * queries) for share in place)
        paste(overlaid(image.cpu(), maps[row, across].cpu(), colour), column)
        left = column * (side + GAP)
        draw.rectangle((left, 0, left + side - 1, side - 1), outline=colour, width=2)
        corners = (across * cell, row * cell, across * cell + cell - 1, row * cell + cell - 1)
        draw.rectangle(corners, fill=colour, outline=(255, 255, 255))
    return page


def _to_device(weight: Tensor, y: Tensor | None) -> Tensor | None:
    """Return the labels on the device of `weight`."""
    return None if y is None else y.to(weight.device)
