"""What a training step reads besides the state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sagan.batch_norm import Groups


@dataclass(frozen=True)
class Draw:
    """What a pass draws.

    Attributes:
        rows: the indices of the pass's images in this rank's share of the batch.
        latents: [b, z_dim] in the state's dtype.
        labels: int64 [b], or None for an unconditional model.
        groups: batch-norm groups of the b images.
        augmentation: parameters of the changes of the images that the discriminator gets (see `sagan.diffaugment`), in
            the state's dtype: [2b, 7] of real and then of generated images in the discriminator's update, [b, 7] in the
            generator's. None where images are not changed.
        masks: masks of the discriminator's dropout (see `sagan.dropout`), uint8, with the rows of `augmentation`. None
            for a network without dropout.
    """

    rows: slice
    latents: Tensor
    labels: Tensor | None
    groups: Groups
    augmentation: Tensor | None
    masks: Tensor | None


@dataclass(frozen=True)
class Inputs:
    """Everything on the device that one step reads and that is not in the state.

    Attributes:
        real: real images and labels of each discriminator update.
        draws_d: the draws of each discriminator update, one a pass.
        draws_g: the draws of the generator update, one a pass.
    """

    real: list[tuple[Tensor, Tensor]]
    draws_d: list[list[Draw]]
    draws_g: list[Draw]

    def tensors(self) -> list[Tensor]:
        """Return the tensors whose values differ from step to step."""
        draws = [draw for update in (*self.draws_d, self.draws_g) for draw in update]
        drawn = [tensor for draw in draws for tensor in (draw.latents, draw.labels, draw.augmentation, draw.masks)]
        return [tensor for pair in self.real for tensor in pair] + [tensor for tensor in drawn if tensor is not None]
