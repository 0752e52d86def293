"""Losses of both networks: adversarial, and of the classification of an AC-GAN.

All are sums over images. The sums over the shares of a batch, divided by the batch size, add up to the mean of the
batch, whatever the sizes of the shares.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from sagan.config import AdversarialLoss


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return Σ max(0, 1 − D(x, y)) + Σ max(0, 1 + D(G(z), y)) (paper, equation 4).

    `real` holds the logits of real images and `fake` those of generated images, both [b].
    """
    return F.relu(1 - real).sum() + F.relu(1 + fake).sum()


def generator_hinge(fake: Tensor) -> Tensor:
    """Return −Σ D(G(z), y) over the logits of generated images, [b]."""
    return -fake.sum()


def discriminator_bce(real: Tensor, fake: Tensor) -> Tensor:
    """Return −Σ log s(D(x)) − Σ log(1 − s(D(G(z)))), where s is the sigmoid (Goodfellow et al. 2014).

    `real` holds the logits of real images and `fake` those of generated images, both [b].
    """
    return F.softplus(-real).sum() + F.softplus(fake).sum()


def generator_bce(fake: Tensor) -> Tensor:
    """Return −Σ log s(D(G(z))) over the logits of generated images, [b]: the loss that does not saturate."""
    return F.softplus(-fake).sum()


_ADVERSARIAL = {"hinge": (discriminator_hinge, generator_hinge), "bce": (discriminator_bce, generator_bce)}


@dataclass(frozen=True)
class Loss:
    """Loss of a system. Its methods take outputs of the discriminator, [b] or [b, 2] (see `Discriminator.forward`).

    Outputs with the likelihoods of labels add the loss of an AC-GAN to both networks: −λ Σ log p(y | x) over real and
    generated images for the discriminator, and over generated images for the generator (Odena et al. 2017).

    Attributes:
        adversarial: the loss of the logits.
        auxiliary_weight: λ.
    """

    adversarial: AdversarialLoss = "hinge"
    auxiliary_weight: float = 1.0

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the discriminator's loss for its outputs for real and for generated images, a scalar."""
        of_logits, _ = _ADVERSARIAL[self.adversarial]
        return self._with_labels(of_logits(logits(real), logits(fake)), real, fake)

    def generator(self, fake: Tensor) -> Tensor:
        """Return the generator's loss for the discriminator's outputs for generated images, a scalar."""
        _, of_logits = _ADVERSARIAL[self.adversarial]
        return self._with_labels(of_logits(logits(fake)), fake)

    def _with_labels(self, loss: Tensor, *outputs: Tensor) -> Tensor:
        for output in outputs:
            if output.ndim == 2:
                loss = loss - self.auxiliary_weight * output[:, 1].sum()
        return loss


def logits(output: Tensor) -> Tensor:
    """Return the logits [b] of outputs of the discriminator, [b] or [b, 2]."""
    return output[:, 0] if output.ndim == 2 else output
