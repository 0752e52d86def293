"""Random changes of real images. They depend on a seed and on the position of an image in the run."""

from __future__ import annotations

import torch

from sagan.device import on_device
from sagan.random import draw_flips


def mirror_at_random(images: torch.Tensor, positions: range, seed: int) -> torch.Tensor:
    """Mirror each image [b, 3, H, W] with probability one half.

    Args:
        images: The images, on any device.
        positions: Positions of the images in the run.
        seed: Seed of the draw.
    """
    mirrored = on_device(draw_flips(seed, positions), images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)
