"""The hinge loss (paper, equation 4), as sums so that unequal shares of a batch add up to its mean."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Σ max(0, 1 − D(x, y)) + Σ max(0, 1 + D(G(z), y)) over logits [b] each."""
    return F.relu(1 - real).sum() + F.relu(1 + fake).sum()


def generator_hinge(fake: Tensor) -> Tensor:
    """−Σ D(G(z), y)."""
    return -fake.sum()
