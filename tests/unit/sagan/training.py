"""Small states that train for some steps on generated images."""

from __future__ import annotations

from typing import Any

import torch

from sagan import ModelConfig, Step, TrainState
from sagan.random import Purpose, draw_labels, draw_latents

CONFIG = ModelConfig(resolution=32, num_classes=3, z_dim=8, channels_g=4, channels_d=4)
ACGAN = {"architecture": "acgan", "resolution": 128, "condition_d": "classifier", "channels_g": 2, "channels_d": 1}
BATCH = 8


def real(images: int, classes: int = 3, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of images and labels at a position."""
    positions = range(images, images + BATCH)
    pixels = draw_latents(9, Purpose.DEQUANTISE, positions, 3 * size**2).view(-1, 3, size, size).clamp(-1, 1)
    return pixels, draw_labels(9, Purpose.DEQUANTISE, positions, classes)


def run(state: TrainState, steps: int, **options: Any) -> list[list[float]]:
    """The metrics of each step."""
    step, size = Step(state, BATCH, **options), state.model.known_resolution
    updates = range(state.optim.n_dis)
    return [step([real(state.images + k * BATCH, size=size) for k in updates]).tolist() for _ in range(steps)]


def same(a: TrainState, b: TrainState) -> bool:
    """Whether all tensors are equal to the bit."""
    ours, theirs = dict(a.tensors()), dict(b.tensors())
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)
