"""Batch norm over groups of the global batch, conditional and plain.

Conditional after de Vries et al. 2017, as in brain-research/self-attention-gan.

Statistics belong to images, not to machines: a group may be the whole batch over all ranks, or every n-th image of it.
Per image and channel the mean and the variance over its pixels are taken first; groups, ranks and unequal shares are
then combined from those in one gather forwards and one sum backwards, none where every group lies inside its rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sagan.world import World, on_device

# Decay of the running averages, per generator update (official code)
DECAY, LAST_DECAY = 0.999, 0.9999


class Groups:
    """Which group each local image belongs to: its position mod `count`.

    `membership` is float32 [count, b] with a single 1 per column. `world` is a world of one where every group lies
    inside its rank, so that no collective is called.

    Raises ValueError where a group spans ranks and `world` does not promise that all of them take part.
    """

    def __init__(self, positions: range, count: int, world: World, device: torch.device) -> None:
        self.world = world if count % world.size else World()
        if self.world.size > 1 and not world.joint:
            raise ValueError(
                f"a batch-norm group spans {world.size} ranks, so every rank must run this forward: pass "
                "world.joined() on all of them. For images on one rank alone leave `groups` out (running statistics)"
            )
        index = torch.tensor([p % count for p in positions])
        self.membership = on_device((torch.arange(count)[:, None] == index).float(), device)


class _GroupNorm(torch.autograd.Function):
    """y = x̂ · scale + shift, with x̂ normalised over its group. Statistics are float32 at least."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor, membership: Tensor, world: World, eps: float):  # type: ignore[no-untyped-def]
        mean, variance = image_statistics(x)
        membership = membership.to(mean.dtype)
        count, group_mean, group_var = _combine_images(mean, variance, membership)
        if world.size > 1:
            packed = torch.cat([count[:, None], group_mean, group_var], dim=1)
            count, group_mean, group_var = _combine_ranks(world.gather(packed), mean.shape[1])
        # a group without a local image has no column in `membership`: its values are never used
        mean, rstd = membership.t() @ group_mean, membership.t() @ (group_var + eps).rsqrt()
        factor = rstd * scale
        y = _affine(x, factor, shift - mean * factor)
        ctx.save_for_backward(x, scale, mean, rstd, membership, membership.t() @ count)
        ctx.world = world
        weights = count / count.sum()
        batch_mean, batch_var = weights @ group_mean, weights @ group_var
        ctx.mark_non_differentiable(batch_mean, batch_var)
        return y, batch_mean, batch_var

    @staticmethod
    def backward(ctx, dy: Tensor, *_: Tensor):  # type: ignore[no-untyped-def]
        x, scale, mean, rstd, membership, count = ctx.saved_tensors
        pixels = x.shape[2] * x.shape[3]
        dshift = dy.sum((2, 3), dtype=mean.dtype)
        dscale = (x - mean[..., None, None]).mul_(dy).sum((2, 3)) * rstd
        sums = torch.stack([membership @ (scale * dshift), membership @ (scale * dscale)])
        ctx.world.sum_(sums)
        d_mean, d_var = (membership.t() @ s / (count[:, None] * pixels) for s in sums)
        # dx = rstd · (scale · dy − d_mean − x̂ · d_var), as one affine function of dy and x
        slope = -rstd.square() * d_var
        dx = _affine(x, slope, -rstd * d_mean - slope * mean)
        return dx.addcmul_(dy, (rstd * scale).to(dy.dtype)[..., None, None]), dscale, dshift, None, None, None


def _affine(x: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """factor · x + offset with [b, C] coefficients."""
    return torch.addcmul(offset.to(x.dtype)[..., None, None], x, factor.to(x.dtype)[..., None, None])


def image_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """[b, C] mean and biased variance over the pixels of each image, float32 at least, x [b, C, H, W].

    In two passes: torch.var_mean takes five to eighteen times as long on channels-last maps (CPU, torch 2.13).
    """
    mean = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, (x - mean[..., None, None]).square_().mean((2, 3))


def _combine_images(mean: Tensor, variance: Tensor, membership: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """([n] images, [n, C] mean, [n, C] variance) of the groups, from those of images of equal size."""
    count = membership.sum(1)
    weights = membership / count.clamp(min=1)[:, None]
    group_mean = weights @ mean
    deviation = mean - membership.t() @ group_mean
    return count, group_mean, weights @ (variance + deviation.square())


def _combine_ranks(packed: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same over ranks, from [W, n, 1 + 2C]; every rank adds in the same order, so all get the same bits."""
    counts, means, variances = packed.split([1, channels, channels], dim=2)
    count = counts.sum(0)
    weights = counts / count.clamp(min=1)
    mean = (weights * means).sum(0)
    return count[:, 0], mean, (weights * (variances + (means - mean).square())).sum(0)


class BatchNorm(nn.Module):
    """Plain batch norm with a learned scale and shift; `BatchNorm` of the official code's last layer.

    In training it normalises over `groups`; in evaluation with `running_mean` and `running_var`. A training forward
    leaves what it used in `batch_mean` and `batch_var` (the mean over groups); only `track` moves the running averages.
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
        self._add_affine(channels)

    def _add_affine(self, channels: int) -> None:
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def _affine(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """[b, C] scale and shift of each image."""
        return self.weight.expand(len(x), -1), self.bias.expand(len(x), -1)

    def forward(self, x: Tensor, y: Tensor | None, groups: Groups | None) -> Tensor:
        """x [b, C, H, W], labels y int64 [b] or None; `groups` in training, None in evaluation."""
        scale, shift = self._affine(x, y)
        if groups is None:
            factor = scale * (self.running_var + self.eps).rsqrt()
            return _affine(x, factor, shift - self.running_mean * factor)
        with torch.autocast(x.device.type, enabled=False):  # statistics stay float32
            y_, self.batch_mean, self.batch_var = _GroupNorm.apply(
                x, scale, shift, groups.membership, groups.world, self.eps
            )
        return y_


class ConditionalBatchNorm(BatchNorm):
    """Batch norm whose scale and shift are looked up by class; the tables are never spectrally normalised."""

    def __init__(self, channels: int, classes: int, eps: float) -> None:
        self.classes = classes
        super().__init__(channels, eps)

    def _add_affine(self, channels: int) -> None:
        self.weight = nn.Parameter(torch.ones(self.classes, channels))
        self.bias = nn.Parameter(torch.zeros(self.classes, channels))

    def _affine(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert y is not None
        return self.weight[y], self.bias[y]


def conditional(channels: int, classes: int, eps: float) -> BatchNorm:
    """Conditional batch norm where there are classes, else plain."""
    return ConditionalBatchNorm(channels, classes, eps) if classes else BatchNorm(channels, eps)


def layers(network: nn.Module) -> list[BatchNorm]:
    return [module for module in network.modules() if isinstance(module, BatchNorm)]


def used(network: nn.Module) -> Tensor:
    """What the last training forward of every layer normalised with, as one vector: means and variances in turn."""
    return torch.cat([statistic for norm in layers(network) for statistic in (norm.batch_mean, norm.batch_var)])


@torch.no_grad()
def track(network: nn.Module, statistics: Tensor, world: World) -> None:
    """Move every layer's running averages by `statistics` as of `used`, averaged over ranks."""
    flat = world.sum_(statistics) / world.size
    averages = [average for norm in layers(network) for average in (norm.running_mean, norm.running_var)]
    decays = [norm.decay for norm in layers(network) for _ in range(2)]
    for average, decay, now in zip(averages, decays, flat.split([len(a) for a in averages]), strict=True):
        average.lerp_(now.to(average), 1 - decay)
