"""3×3 convolutions with nearest upsampling or average downsampling, at a quarter of the multiplications.

Both identities are exact, borders included. They use the 3×3 weight itself, so σ equals the σ of the plain convolution.
The filters around the convolutions save no tensors for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_ELEMENTS = 2**31 - 1
"""Largest number of elements that CUDA's pooling and upsampling kernels count. Larger batches are split."""


def _in_parts(function: Callable[[Tensor], Tensor], x: Tensor, elements: int) -> Tensor:
    """Return `function(x)` for x [b, C, H, W] in the dtype of x, also under autocast, which would upsample in float32.

    Args:
        function: maps each image of a batch alone.
        x: the batch.
        elements: the larger number of elements of an image before and after.
    """
    with torch.autocast(x.device.type, enabled=False):
        images = MOST_ELEMENTS // elements
        if len(x) <= images:
            return function(x)
        return torch.cat([function(part) for part in x.split(images)])


class _Box(torch.autograd.Function):
    """Box filter: sums over 2×2 windows at stride 1, divided by `divisor`.

    The full filter (padding 1) and the valid filter (padding 0) are each other's adjoints.
    """

    @staticmethod
    def forward(ctx, x: Tensor, padding: int, divisor: int):  # type: ignore[no-untyped-def]
        ctx.padding, ctx.divisor = padding, divisor
        return _box(x, padding, divisor)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _box(grad, 1 - ctx.padding, ctx.divisor), None, None


class _Double(torch.autograd.Function):
    """Nearest upsampling ×2. Its adjoint sums over 2×2 windows."""

    @staticmethod
    def forward(ctx, x: Tensor):  # type: ignore[no-untyped-def]
        return _upsample(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _in_parts(lambda part: F.avg_pool2d(part, 2, divisor_override=1), grad, grad[0].numel())


class _Halve(torch.autograd.Function):
    """2×2 average pooling. Its adjoint divides by four and upsamples to the nearest pixel."""

    @staticmethod
    def forward(ctx, x: Tensor):  # type: ignore[no-untyped-def]
        return _in_parts(lambda part: F.avg_pool2d(part, 2), x, x[0].numel())

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _upsample(grad / 4)


def _box(x: Tensor, padding: int, divisor: int) -> Tensor:
    """Return the sums over 2×2 windows, divided by `divisor`."""
    _, channels, height, width = x.shape
    elements = channels * (height + padding) * (width + padding)
    return _in_parts(lambda part: F.avg_pool2d(part, 2, 1, padding, divisor_override=divisor), x, elements)


def _upsample(x: Tensor) -> Tensor:
    """Return the nearest upsampling ×2."""
    return _in_parts(lambda part: F.interpolate(part, scale_factor=2), x, 4 * x[0].numel())


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
