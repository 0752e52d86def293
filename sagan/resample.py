"""A 3×3 convolution with nearest up- or average down-sampling, at a quarter of the multiplications.

Both identities are exact, borders included, and use the 3×3 weight itself, so σ is that of the plain convolution. The
filters around them keep nothing for their gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class _Box(torch.autograd.Function):
    """Sums over 2×2 windows at stride 1, over `divisor`. Full (padding 1) and valid (0) are each other's adjoints."""

    @staticmethod
    def forward(ctx, x: Tensor, padding: int, divisor: int):  # type: ignore[no-untyped-def]
        ctx.padding, ctx.divisor = padding, divisor
        return F.avg_pool2d(x, 2, stride=1, padding=padding, divisor_override=divisor)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return F.avg_pool2d(grad, 2, stride=1, padding=1 - ctx.padding, divisor_override=ctx.divisor), None, None


class _Double(torch.autograd.Function):
    """Nearest upsampling ×2; its adjoint sums over 2×2 windows."""

    @staticmethod
    def forward(ctx, x: Tensor):  # type: ignore[no-untyped-def]
        return F.interpolate(x, scale_factor=2)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return F.avg_pool2d(grad, 2, divisor_override=1)


class _Halve(torch.autograd.Function):
    """2×2 average pooling; its adjoint is nearest upsampling of a quarter."""

    @staticmethod
    def forward(ctx, x: Tensor):  # type: ignore[no-untyped-def]
        return F.avg_pool2d(x, 2)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return F.interpolate(grad / 4, scale_factor=2)


def double(x: Tensor) -> Tensor:
    """Nearest upsampling ×2."""
    return _Double.apply(x)


def halve(x: Tensor) -> Tensor:
    """2×2 average pooling."""
    return _Halve.apply(x)


def up_conv(x: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
    """conv3x3(nearest ×2 (x)): a strided transposed convolution, then sums over 2×2.

    `transposed` is the convolution's weight as its transpose takes it, [in, out, 3, 3] and flipped in both directions.
    """
    # the bias comes last: in a transposed convolution it costs oneDNN up to nine times the time (bfloat16, torch 2.13)
    h = _Box.apply(F.conv_transpose2d(x, transposed, stride=2), 0, 1)
    return h if bias is None else h.add_(bias.to(h.dtype)[:, None, None])


def conv_down(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """avg_pool2(conv3x3(x)): a 2×2 box filter, then a strided convolution."""
    return F.conv2d(_Box.apply(x, 1, 4), weight, bias, stride=2)
