"""3×3 convolutions with nearest upsampling or average downsampling, at a quarter of the multiplications.

Both identities are exact, borders included. They use the 3×3 weight itself, so σ equals the σ of the plain convolution.
The filters around the convolutions save no tensors for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class _Box(torch.autograd.Function):
    """Box filter: sums over 2×2 windows at stride 1, divided by `divisor`.

    The full filter (padding 1) and the valid filter (padding 0) are each other's adjoints.
    """

    @staticmethod
    def forward(ctx, x: Tensor, padding: int, divisor: int):  # type: ignore[no-untyped-def]
        ctx.padding, ctx.divisor = padding, divisor
        return F.avg_pool2d(x, 2, stride=1, padding=padding, divisor_override=divisor)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return F.avg_pool2d(grad, 2, stride=1, padding=1 - ctx.padding, divisor_override=ctx.divisor), None, None


class _Double(torch.autograd.Function):
    """Nearest upsampling ×2. Its adjoint sums over 2×2 windows."""

    @staticmethod
    def forward(ctx, x: Tensor):  # type: ignore[no-untyped-def]
        return F.interpolate(x, scale_factor=2)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return F.avg_pool2d(grad, 2, divisor_override=1)


class _Halve(torch.autograd.Function):
    """2×2 average pooling. Its adjoint divides by four and upsamples to the nearest pixel."""

    @staticmethod
    def forward(ctx, x: Tensor):  # type: ignore[no-untyped-def]
        return F.avg_pool2d(x, 2)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return F.interpolate(grad / 4, scale_factor=2)


def double(x: Tensor) -> Tensor:
    """Return [b, C, 2H, 2W], the nearest upsampling ×2 of x [b, C, H, W]."""
    return _Double.apply(x)


def halve(x: Tensor) -> Tensor:
    """Return [b, C, H/2, W/2], the 2×2 average pooling of x [b, C, H, W]."""
    return _Halve.apply(x)


def up_conv(x: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
    """Return conv3x3(nearest ×2 (x)), computed as a strided transposed convolution and then sums over 2×2 windows.

    Args:
        x: float [b, in, H, W].
        transposed: the weight of the convolution in the layout of a transposed convolution: [in, out, 3, 3], flipped
            in both directions.
        bias: float [out], or None.
    """
    # The bias is added last. With a bias, oneDNN's transposed convolution takes up to nine times as long (bfloat16,
    # torch 2.13).
    h = _Box.apply(F.conv_transpose2d(x, transposed, stride=2), 0, 1)
    return h if bias is None else h.add_(bias.to(h.dtype)[:, None, None])


def conv_down(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return avg_pool2(conv3x3(x)), computed as a 2×2 box filter and then a strided convolution.

    Args:
        x: float [b, in, H, W].
        weight: float [out, in, 3, 3].
        bias: float [out], or None.
    """
    return F.conv2d(_Box.apply(x, 1, 4), weight, bias, stride=2)
