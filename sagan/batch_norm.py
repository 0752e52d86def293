"""Plain and conditional batch norm over groups of the global batch.

Conditional batch norm follows de Vries et al. 2017, as in brain-research/self-attention-gan.

Groups consist of images and do not depend on machines. A group is the whole batch over all ranks, or every n-th image
of the batch. A training forward first computes the mean and the variance over the pixels of each image and channel. It
then combines them within groups and over ranks, whose shares may be unequal. The forward pass takes one gather and the
backward pass one sum. No collective is called where every group lies inside one rank.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagan.device import kernels, on_device
from sagan.ranks import World
from sagan.rectifier import rectifier_gradient, rectify_

# Decay of the running averages per generator update (official code): all layers but the last, and the last layer
DECAY, LAST_DECAY = 0.999, 0.9999


class Groups:
    """Assignment of local images to batch-norm groups. The group of an image is its position mod `count`.

    Args:
        positions: positions of the local images.
        count: number of groups in the global batch.
        world: the ranks that share the batch.
        device: device of `membership`.

    Attributes:
        membership: float32 [count, b]. Each column has a single 1, in the row of the image's group.
        world: the ranks to combine statistics over. It is a world of one where every group lies inside its rank, so
            that no collective is called.

    Raises ValueError where a group spans ranks and `world.joint` does not promise that all ranks take part.
    """

    def __init__(self, positions: range, count: int, world: World, device: torch.device) -> None:
        self.world = world if count % world.size else World()
        if self.world.size > 1 and not world.joint:
            raise ValueError(
                f"a batch-norm group spans {world.size} ranks, so every rank must run this forward: pass "
                "world.joined() on every rank. To run it on one rank alone, leave `groups` out; batch norm then uses "
                "its running averages"
            )
        index = torch.tensor([p % count for p in positions])
        self.membership = on_device((torch.arange(count)[:, None] == index).float(), device)
        self._matrices: dict[torch.dtype, GroupMatrices] = {}

    def twice(self) -> Groups:
        """Return the groups of two batches behind one another. Each batch has groups of its own, which are as these."""
        groups = copy(self)
        groups.membership = torch.block_diag(self.membership, self.membership)
        groups._matrices = {}
        return groups

    def matrices(self, dtype: torch.dtype) -> GroupMatrices:
        """Return the matrices of the groups in a dtype. All layers of a forward pass share them."""
        if dtype not in self._matrices:
            membership = self.membership.to(dtype)
            images = membership.sum(1)
            averaging = membership / images.clamp(min=1)[:, None]
            self._matrices[dtype] = GroupMatrices(membership, averaging, images, images / images.sum())
        return self._matrices[dtype]


class GroupMatrices(NamedTuple):
    """What assigns b local images to n groups, and what averages over them.

    Attributes:
        membership: [n, b]. Each column has a single 1, in the row of the image's group.
        averaging: [n, b], the rows of `membership` divided by their sums. It takes the mean of each group.
        images: [n], the number of local images of each group.
        shares: [n], `images` divided by their sum.
    """

    membership: Tensor
    averaging: Tensor
    images: Tensor
    shares: Tensor


class _GroupNorm(torch.autograd.Function):
    """Compute y = rectify(x̂ · scale + shift), where x̂ is x normalised over its group.

    There is no rectifier where `slope` is None. Statistics are float32 at least. Returns y and the mean and the
    variance of the batch, each [C]: the means over groups, weighted by their images.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        matrices: GroupMatrices,
        world: World,
        eps: float,
        slope: float | None,
    ):
        mean, variance = image_statistics(x)
        membership, averaging, images, shares = matrices
        group_mean, group_var = _combine_images(mean, variance, membership, averaging)
        if world.size > 1:
            packed = torch.cat([images[:, None], group_mean, group_var], dim=1)
            images, group_mean, group_var = _combine_ranks(world.gather(packed), mean.shape[1])
            averaging, shares = membership / images.clamp(min=1)[:, None], images / images.sum()
        # No column of `membership` selects a group without a local image, so the values of that group are not used.
        mean, rstd = membership.t() @ group_mean, membership.t() @ (group_var + eps).rsqrt()
        factor = rstd * scale
        y = _rectified_affine(x, factor, torch.addcmul(shift, mean, factor, value=-1), slope)
        ctx.save_for_backward(x, y, scale, mean, rstd, membership, averaging)
        ctx.world, ctx.slope = world, slope
        batch_mean, batch_var = shares @ group_mean, shares @ group_var
        ctx.mark_non_differentiable(batch_mean, batch_var)
        ctx.set_materialize_grads(False)
        return y, batch_mean, batch_var

    @staticmethod
    def backward(ctx, dy: Tensor | None, *_: None):  # type: ignore[no-untyped-def]
        if dy is None:  # nothing uses y
            return (None,) * 7
        x, y, scale, mean, rstd, membership, averaging = ctx.saved_tensors
        pixels = x.shape[2] * x.shape[3]
        dy, dshift, along = _gradient_sums(x, y, dy, mean, ctx.slope)
        dscale = along * rstd
        sums = membership @ torch.stack([dshift, dscale]).mul_(scale)  # [2, n, C]
        ctx.world.sum_(sums)
        d_mean, d_var = averaging.t() @ sums.div_(pixels)
        # dx = rstd · (scale · dy − d_mean − x̂ · d_var), written as one affine function of dy and x
        minus_rstd = -rstd
        x_factor = minus_rstd * rstd * d_var
        offset = torch.addcmul(minus_rstd * d_mean, x_factor, mean, value=-1)
        dx = _affine_of_two(x, dy, x_factor, rstd * scale, offset)
        return dx, dscale, dshift, None, None, None, None


def _affine(x: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Return factor · x + offset for x [b, C, H, W] and coefficients [b, C] or [C]."""
    return torch.addcmul(offset.to(x.dtype)[..., None, None], x, factor.to(x.dtype)[..., None, None])


def image_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance over the pixels of each image, both [b, C] and float32 at least.

    x is [b, C, H, W]. The function takes two passes, because torch.var_mean takes five to eighteen times as long on
    channels-last maps (CPU, torch 2.13).
    """
    if (cuda := kernels(x)) is not None:
        return cuda.image_statistics(x)
    mean = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, (x - mean[..., None, None]).square_().mean((2, 3))


def _rectified_affine(x: Tensor, factor: Tensor, offset: Tensor, slope: float | None) -> Tensor:
    """Return rectify(factor · x + offset), or factor · x + offset where `slope` is None."""
    if (cuda := kernels(x)) is not None:
        return cuda.rectified_affine(x, factor, offset, slope)
    y = _affine(x, factor, offset)
    return y if slope is None else rectify_(y, slope)


def _gradient_sums(
    x: Tensor, y: Tensor, dy: Tensor, mean: Tensor, slope: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient before the rectifier of y, and its sums over pixels without and with the factor x − mean.

    The first is [b, C, H, W], the sums are [b, C].
    """
    if (cuda := kernels(x)) is not None:
        return cuda.gradient_sums(x, y, dy, mean, slope)
    if slope is not None:
        dy = rectifier_gradient(dy, y, slope)
    return dy, dy.sum((2, 3), dtype=mean.dtype), (x - mean[..., None, None]).mul_(dy).sum((2, 3))


def _affine_of_two(x: Tensor, dy: Tensor, x_factor: Tensor, dy_factor: Tensor, offset: Tensor) -> Tensor:
    """Return x_factor · x + dy_factor · dy + offset."""
    if (cuda := kernels(x)) is not None:
        return cuda.affine_of_two(x, dy, x_factor, dy_factor, offset)
    return _affine(x, x_factor, offset).addcmul_(dy, dy_factor.to(dy.dtype)[..., None, None])


def _combine_images(mean: Tensor, variance: Tensor, membership: Tensor, averaging: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of each of n groups, both [n, C].

    `mean` and `variance` are [b, C], of images that all have the same size. The matrices are [n, b].
    """
    group_mean = averaging @ mean
    deviation = torch.addmm(mean, membership.t(), group_mean, alpha=-1)
    return group_mean, averaging @ torch.addcmul(variance, deviation, deviation)


def _combine_ranks(packed: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of images [n], the mean [n, C] and the variance [n, C] of each group over all ranks.

    `packed` is [ranks, n, 1 + 2C]: the same three of each rank. Every rank adds in the same order, so all ranks get the
    same bits.
    """
    counts, means, variances = packed.split([1, channels, channels], dim=2)
    count = counts.sum(0)
    weights = counts / count.clamp(min=1)
    mean = (weights * means).sum(0)
    return count[:, 0], mean, (weights * (variances + (means - mean).square())).sum(0)


class BatchNorm(nn.Module):
    """Plain batch norm with a learned scale and shift per channel, as in the last layer of the official generator.

    In training it normalises over `groups`. In evaluation it normalises with `running_mean` and `running_var`. A
    training forward stores the statistics that it used, as means over groups, in `batch_mean` and `batch_var`. Only
    `track` moves the running averages.

    Args:
        channels: C, the number of channels.
        eps: constant that is added to variances.
        decay: decay of the running averages per generator update.
    """

    running_mean: Tensor
    running_var: Tensor
    batch_mean: Tensor
    batch_var: Tensor

    def __init__(self, channels: int, eps: float, decay: float = DECAY) -> None:
        super().__init__()
        self.eps, self.decay = eps, decay
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self._add_parameters(channels)

    def _add_parameters(self, channels: int) -> None:
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def _scale_and_shift(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the scale and the shift of each image, both [b, C]."""
        return self.weight.expand(len(x), -1), self.bias.expand(len(x), -1)

    def forward(self, x: Tensor, y: Tensor | None, groups: Groups | None, slope: float | None = None) -> Tensor:
        """Normalise and rectify a batch.

        Args:
            x: float [b, C, H, W].
            y: labels, int64 [b]. Plain batch norm ignores them.
            groups: the groups to normalise over in training; None in evaluation.
            slope: negative slope of the rectifier that follows; None for no rectifier.
        """
        scale, shift = self._scale_and_shift(x, y)
        if groups is None:
            factor = scale * (self.running_var + self.eps).rsqrt()
            normalised = _affine(x, factor, shift - self.running_mean * factor)
            return normalised if slope is None else rectify_(normalised, slope)
        with torch.autocast(x.device.type, enabled=False):  # statistics stay float32
            matrices = groups.matrices(torch.promote_types(x.dtype, torch.float32))
            normalised, self.batch_mean, self.batch_var = _GroupNorm.apply(
                x, scale, shift, matrices, groups.world, self.eps, slope
            )
        return normalised


class ConditionalBatchNorm(BatchNorm):
    """Batch norm that looks up scale and shift by label, in tables [num_classes, C] without spectral norm."""

    def __init__(self, channels: int, num_classes: int, eps: float) -> None:
        self.num_classes = num_classes
        super().__init__(channels, eps)

    def _add_parameters(self, channels: int) -> None:
        self.weight = nn.Parameter(torch.ones(self.num_classes, channels))
        self.bias = nn.Parameter(torch.zeros(self.num_classes, channels))

    def _scale_and_shift(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert y is not None
        return F.embedding(y, self.weight), F.embedding(y, self.bias)


def conditional(channels: int, num_classes: int, eps: float) -> BatchNorm:
    """Return conditional batch norm, or plain batch norm where `num_classes` is 0."""
    return ConditionalBatchNorm(channels, num_classes, eps) if num_classes else BatchNorm(channels, eps)


def layers(network: nn.Module) -> list[BatchNorm]:
    """Return the batch-norm layers of a network."""
    return [module for module in network.modules() if isinstance(module, BatchNorm)]


def used(network: nn.Module) -> Tensor:
    """Return the statistics that the last training forward used, as one vector: mean and variance of each layer."""
    return torch.cat([statistic for norm in layers(network) for statistic in (norm.batch_mean, norm.batch_var)])


@torch.no_grad()
def track(network: nn.Module, statistics: Tensor, world: World) -> None:
    """Move the running averages of every layer towards the mean of `statistics` over ranks.

    `statistics` has the form that `used` returns.
    """
    rank_mean = world.sum_(statistics) / world.size
    running = [buffer for norm in layers(network) for buffer in (norm.running_mean, norm.running_var)]
    decays = [norm.decay for norm in layers(network) for _ in range(2)]
    targets = rank_mean.split([len(buffer) for buffer in running])
    for decay in set(decays):
        chosen = [number for number, its_decay in enumerate(decays) if its_decay == decay]
        torch._foreach_lerp_([running[n] for n in chosen], [targets[n] for n in chosen], 1 - decay)
