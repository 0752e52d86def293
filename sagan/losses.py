"""Hinge losses (paper, equation 4).

Both are sums over images. The sums over the shares of a batch, divided by the batch size, add up to the mean of the
batch, whatever the sizes of the shares.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return Σ max(0, 1 − D(x, y)) + Σ max(0, 1 + D(G(z), y)).

    `real` holds the logits of real images and `fake` those of generated images, both [b].
    """
    return F.relu(1 - real).sum() + F.relu(1 + fake).sum()


def generator_hinge(fake: Tensor) -> Tensor:
    """Return −Σ D(G(z), y) over the logits of generated images, [b]."""
    return -fake.sum()
