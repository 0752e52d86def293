"""3×3 convolutions with nearest upsampling or average downsampling, at less than half of the multiplications.

A 2×2 box filter and a strided convolution replace each. The filter commutes with the convolution, so it runs on the
feature map, or on the weight, which becomes 4×4. The first form takes 9/36 of the multiplications, the second 16/36.
Both are exact, borders included. They use the 3×3 weight itself, so σ equals the σ of the plain convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sagan.bias import add_bias_, convolve
from sagan.device import kernels


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
        return _sums_of_four(grad, 1)


class _Halve(torch.autograd.Function):
    """2×2 average pooling. Its adjoint divides by four and upsamples to the nearest pixel."""

    @staticmethod
    def forward(ctx, x: Tensor):  # type: ignore[no-untyped-def]
        return _sums_of_four(x, 4)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _upsample(grad / 4)


def _box(x: Tensor, padding: int, divisor: int) -> Tensor:
    """Return the sums over 2×2 windows at stride 1 of x [b, C, H, W], divided by `divisor`."""
    if (cuda := kernels(x)) is not None:
        return cuda.box(x, padding, divisor)
    return F.avg_pool2d(x, 2, 1, padding, divisor_override=divisor)


# On channels-last maps, CUDA's kernel for nearest upsampling takes twice as long as a copy, and its kernel for pooling
# at stride 2 takes three times as long as a sum (H200, torch 2.11). Autocast also runs the first kernel in float32.


def _upsample(x: Tensor) -> Tensor:
    """Return the nearest upsampling ×2 of x [b, C, H, W]."""
    if x.device.type != "cuda":
        return F.interpolate(x, scale_factor=2)
    if (cuda := kernels(x)) is not None:
        return cuda.upsample(x)
    b, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]
    repeated = pixels.expand(b, height, 2, width, 2, channels).reshape(b, 2 * height, 2 * width, channels)
    return repeated.permute(0, 3, 1, 2)


def _sums_of_four(x: Tensor, divisor: int) -> Tensor:
    """Return the sums over 2×2 windows at stride 2 of x [b, C, H, W], divided by `divisor`."""
    if x.device.type != "cuda":
        return F.avg_pool2d(x, 2, divisor_override=divisor)
    if (cuda := kernels(x)) is not None:
        return cuda.sums_of_four(x, divisor)
    # In the order of the pooling kernel and in float32 at least, so that the bits are the same
    first, second, third, fourth = (x[..., i::2, j::2] for i in range(2) for j in range(2))
    total = first.to(torch.promote_types(x.dtype, torch.float32)) + second
    total += third
    total += fourth
    return total.div_(divisor).to(x.dtype)


def double(x: Tensor) -> Tensor:
    """Return [b, C, 2H, 2W], the nearest upsampling ×2 of x [b, C, H, W]."""
    return _Double.apply(x)


def halve(x: Tensor) -> Tensor:
    """Return [b, C, H/2, W/2], the 2×2 average pooling of x [b, C, H, W]."""
    return _Halve.apply(x)


def up_conv(x: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
    """Return conv3x3(nearest ×2 (x)), computed as a strided transposed convolution and sums over 2×2 windows.

    Args:
        x: float [b, in, H, W].
        transposed: the weight of the convolution in the layout of a transposed convolution: [in, out, 3, 3], flipped
            in both directions.
        bias: float [out], or None.
    """
    if _filters_weight(x, side=2 * x.shape[3]):
        return convolve(F.conv_transpose2d, x, _Box.apply(transposed, 1, 1), bias, stride=2, padding=1)
    # The bias is added last. With a bias, oneDNN's transposed convolution takes up to nine times as long (bfloat16,
    # torch 2.13).
    h = _Box.apply(F.conv_transpose2d(x, transposed, stride=2), 0, 1)
    return h if bias is None else add_bias_(h, bias)


def conv_down(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return avg_pool2(conv3x3(x)), computed as a 2×2 box filter and a strided convolution.

    Args:
        x: float [b, in, H, W].
        weight: float [out, in, 3, 3].
        bias: float [out], or None.
    """
    if _filters_weight(x, side=x.shape[3]):
        return convolve(F.conv2d, x, _Box.apply(weight, 1, 4), bias, stride=2, padding=1)
    return convolve(F.conv2d, _Box.apply(x, 1, 4), weight, bias, stride=2)


def _filters_weight(x: Tensor, side: int) -> bool:
    """Return whether the box filter runs on the weight of a convolution of x. `side` is that of the larger map.

    On an H200 the filter of the map takes longer than the convolution. Without it a layer takes up to eight times less
    (torch 2.11). The filter of the weight takes longer where maps are below 16×16, and on CPUs.
    """
    return x.device.type == "cuda" and side >= 16
