"""The bias of a convolution, and the rectifier that follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sagan.device import is_cuda, kernels
from sagan.rectifier import rectify_


class _AddBias(torch.autograd.Function):
    """Compute rectify(h + bias) in place with one kernel each way. There is no rectifier where `slope` is None."""

    @staticmethod
    def forward(ctx, h: Tensor, bias: Tensor, slope: float | None):  # type: ignore[no-untyped-def]
        kernels(h).add_bias_(h, bias, slope)
        ctx.mark_dirty(h)
        ctx.slope, ctx.dtype = slope, bias.dtype
        if slope is not None:
            ctx.save_for_backward(h)
        return h

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
        y = dy if ctx.slope is None else ctx.saved_tensors[0]
        dh, sums = kernels(dy).bias_gradient(y, dy, ctx.slope)
        return dh, sums.sum(0).to(ctx.dtype), None


def convolve(
    convolution: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slope: float | None = None,
    **options: Any,
) -> Tensor:
    """Return rectify(convolution(x, weight) + bias), [b, out, H', W'].

    Args:
        convolution: `F.conv2d` or `F.conv_transpose2d`.
        x: float [b, in, H, W].
        weight: the weight in the layout of the convolution.
        bias: float [out], or None.
        slope: negative slope of the rectifier; None for no rectifier.
        **options: further arguments of the convolution.
    """
    if bias is not None and _adds_apart(x):
        return add_bias_(convolution(x, weight, **options), bias, slope)
    h = convolution(x, weight, bias, **options)
    return h if slope is None else rectify_(h, slope)


def add_bias_(h: Tensor, bias: Tensor, slope: float | None = None) -> Tensor:
    """Compute rectify(h + bias) in place for h [b, C, H, W] and bias [C]. Call it only where nothing else reads h."""
    if kernels(h) is not None and h.is_contiguous(memory_format=torch.channels_last):
        return _AddBias.apply(h, bias, slope)
    h = h.add_(bias.to(h.dtype)[:, None, None])
    return h if slope is None else rectify_(h, slope)


def _adds_apart(x: Tensor) -> bool:
    """Return whether a convolution of x does not compute its bias by itself.

    On CUDA, torch adds the bias of a convolution with a kernel that takes three times as long as a copy (H200, 2.11).
    """
    return is_cuda(x.device)
