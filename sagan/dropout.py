"""Dropout with probability one half, for the discriminator of AC-GAN. The position of an image determines its masks."""

from __future__ import annotations

import torch
from torch import Tensor

from sagan.random import Purpose, draw_bytes


def draw_masks(seed: int, purpose: Purpose, positions: range, values: list[int]) -> Tensor:
    """Return the masks of several feature maps of one image per position, a bit per value, uint8 [len(positions), m].

    m is the sum of `mask_bytes(values)`.

    Args:
        seed: seed of the draw.
        purpose: which images the masks are for.
        positions: positions of the images in the run.
        values: numbers of values of the feature maps of an image.
    """
    return draw_bytes(seed, purpose, positions, sum(mask_bytes(values)))


def mask_bytes(values: list[int]) -> list[int]:
    """Return the numbers of bytes of the masks of feature maps with these numbers of values."""
    return [-(-count // 8) for count in values]


def drop_half(x: Tensor, masks: Tensor) -> Tensor:
    """Set the values of x to 0 where their bits are 0, and double the others.

    Args:
        x: float [b, C, H, W].
        masks: uint8 [b, ⌈C·H·W / 8⌉], on the device of x. Bit i mod 8 of byte ⌊i / 8⌋ is that of value i, counted over
            rows, columns and then channels.

    Returns a tensor of the same shape and dtype as x, in the memory format channels_last.
    """
    b, c, h, w = x.shape
    eight = torch.arange(8, dtype=torch.uint8, device=x.device)
    bits = ((masks[:, :, None] >> eight) & 1).flatten(1)[:, : c * h * w]
    return x * (2 * bits).view(b, h, w, c).permute(0, 3, 1, 2).to(x.dtype)
