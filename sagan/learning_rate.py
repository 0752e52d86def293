"""The learning rates over a run."""

from __future__ import annotations

from sagan.config import OptimConfig


def learning_rate_factor(optim: OptimConfig, images: int) -> float:
    """Return the factor of both learning rates in the step that starts at position `images`.

    The factor is 1 without `lr_decay_kimg`. Otherwise it falls linearly from 1 to 0 between the two positions.
    """
    if optim.lr_decay_kimg is None:
        return 1.0
    start, end = optim.lr_decay_kimg
    return min(1.0, max(0.0, (end - images / 1000) / (end - start)))
