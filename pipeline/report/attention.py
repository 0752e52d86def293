"""Where the two networks attend from each place of an image, and the picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from pipeline.data.grids import GAP, PAPER
from sagan.attention import SelfAttention
from sagan.discriminator import Discriminator
from sagan.sampling import Model

MOST_QUERIES, MOST_KEYS = 32, 16  # cells per side that are kept: at most 256 KiB an image and layer
FULL = 8.0  # a cell gets its full colour from so many times an even share on
EVEN, DOUBLING = 69, 23  # how a byte holds a share
PANEL = 128  # pixels per side of a panel of the picture, at least
COLOURS = [(214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189)]
PLACES = [(0.5, 0.5), (0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)]


@dataclass(frozen=True)
class Layer:
    """How one self-attention layer attended in n images.

    Attributes:
        network: "generator" or "discriminator".
        gamma: what the layer's output is multiplied with; at 0 it has no say in the image.
        maps: float [n, Q, Q, K, K], from each cell of a Q×Q grid over the image to each of a K×K grid over the same
            image; over the last two axes they sum to one. Where keys are pooled, K is Q / 2.
    """

    network: str
    gamma: float
    maps: Tensor

    @property
    def queries(self) -> int:
        return self.maps.shape[1]

    @property
    def keys(self) -> int:
        return self.maps.shape[-1]

    @property
    def title(self) -> str:
        return f"{self.network}, {self.queries}×{self.queries}"


def of_generator(model: Model, z: Tensor, y: Tensor | None) -> list[Layer]:
    """Its layers, in their order, while it makes images of z float32 [n, z_dim] and y int64 [n]."""
    weight = next(model.generator.parameters())
    return watched("generator", model.generator, z.to(weight), _beside(weight, y))


def of_discriminator(discriminator: Discriminator, images: Tensor, y: Tensor | None) -> list[Layer]:
    """Its layers, in their order, while it looks at images uint8 [n, 3, H, W] of classes y int64 [n]."""
    weight = next(discriminator.parameters())
    return watched("discriminator", discriminator, images.to(weight) * (2 / 255) - 1, _beside(weight, y))


@torch.inference_mode()
def watched(name: str, network: nn.Module, *inputs: Any) -> list[Layer]:
    """The self-attention layers of `network(*inputs)`, in the order in which they were reached, called `name`'s."""
    layers: list[Layer] = []

    def watch(attention: nn.Module, given: tuple[Tensor]) -> None:
        assert isinstance(attention, SelfAttention)
        (x,) = given
        queries = x.shape[-1]
        keys = queries // 2 if attention.pooled else queries
        maps = attention.maps(x).unflatten(2, (keys, keys)).unflatten(1, (queries, queries))
        layers.append(Layer(name, attention.gamma.item(), maps.cpu()))

    hooks = [m.register_forward_pre_hook(watch) for m in network.modules() if isinstance(m, SelfAttention)]
    try:
        network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def coarse(maps: Tensor, queries: int = MOST_QUERIES, keys: int = MOST_KEYS) -> Tensor:
    """Maps [n, Q, Q, K, K] on at most so many cells per side: the mean over a cell's queries, the sum over keys."""
    n, q, _, k, _ = maps.shape
    few, fewer = min(q, queries), min(k, keys)
    maps = maps.view(n, few, q // few, few, q // few, k, k).mean((2, 4))
    return maps.view(n, few, few, fewer, k // fewer, fewer, k // fewer).sum((4, 6))


def quantised(maps: Tensor) -> Tensor:
    """uint8 of maps of at most 256 cells: 69 is an even share, 23 more is twice as much; 0 is an eighth and less.

    Shares come back to 1.6 % of themselves, in flat maps and in sharp ones.
    """
    times = maps * maps[0, 0, 0].numel()
    return (EVEN + DOUBLING * times.log2()).round().clamp(0, 255).to(torch.uint8)


def overlaid(image: Tensor, attended: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """uint8 [3, S, S]: the image in dim grey and over it, the more of a map [K, K] a cell gets, the colour.

    S must be a multiple of K: each cell is a square of (S / K)² pixels.
    """
    grey = image.float().mean(0) * 0.6
    strength = 0.85 * (attended * attended.numel() / FULL).clamp(max=1)
    strength = strength.repeat_interleave(image.shape[-1] // len(attended), 0)
    strength = strength.repeat_interleave(image.shape[-1] // attended.shape[1], 1)
    return torch.stack([grey * (1 - strength) + c * strength for c in colour]).round().to(torch.uint8)


def picture(image: Tensor, maps: Tensor, places: Sequence[tuple[float, float]] = tuple(PLACES)) -> Image.Image:
    """One row as in figure 1 of Zhang et al. 2019: the image with its query points, then where each of them attends.

    Points and maps share colours. `image` is uint8 [3, S, S], `maps` float [Q, Q, K, K]; at most five `places`, (down,
    across), as shares of the image in [0, 1).
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
        at = (across * cell, row * cell, across * cell + cell - 1, row * cell + cell - 1)
        draw.rectangle(at, fill=colour, outline=(255, 255, 255))
    return page


def _beside(weight: Tensor, y: Tensor | None) -> Tensor | None:
    return None if y is None else y.to(weight.device)
