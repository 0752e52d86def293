"""Operators that stand for kernels which only CUDA has: those of `sagan.cuda_kernels`, and FlashAttention.

They compute nothing and return tensors of the right shapes, so that `tests.benchmarks.counts` counts each as a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sagan import attention, batch_norm, bias, device, resample

_library = torch.library.Library("stand_in", "DEF")


def _define(schema: str, compute: Callable[..., Any]) -> Any:
    """Return a new operator that has only a form without computation."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, compute, "Meta")
    return getattr(torch.ops.stand_in, name)


def _per_image(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def _map(x: Tensor, factor: float, more: int = 0) -> Tensor:
    b, channels, height, width = x.shape
    shape = (b, channels, int(height * factor) + more, int(width * factor) + more)
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


KERNELS = SimpleNamespace(
    image_statistics=_define(
        "image_statistics(Tensor x) -> (Tensor, Tensor)", lambda x: (_per_image(x), _per_image(x))
    ),
    rectified_affine=_define(
        "rectified_affine(Tensor x, Tensor factor, Tensor offset, float? slope) -> Tensor",
        lambda x, *_: torch.empty_like(x),
    ),
    gradient_sums=_define(
        "gradient_sums(Tensor x, Tensor y, Tensor dy, Tensor mean, float? slope) -> (Tensor, Tensor, Tensor)",
        lambda x, y, dy, *_: (torch.empty_like(dy), _per_image(x), _per_image(x)),
    ),
    affine_of_two=_define(
        "affine_of_two(Tensor x, Tensor dy, Tensor x_factor, Tensor dy_factor, Tensor offset) -> Tensor",
        lambda x, *_: torch.empty_like(x),
    ),
    add_bias_=_define("add_bias_(Tensor(a!) h, Tensor bias, float? slope) -> ()", lambda h, bias, slope: None),
    bias_gradient=_define(
        "bias_gradient(Tensor y, Tensor dy, float? slope) -> (Tensor, Tensor)",
        lambda y, dy, slope: (dy if slope is None else torch.empty_like(dy), _per_image(dy)),
    ),
    box=_define(
        "box(Tensor x, int padding, int divisor) -> Tensor",
        lambda x, padding, _: _map(x, 1, 2 * padding - 1),
    ),
    upsample=_define("upsample(Tensor x) -> Tensor", lambda x: _map(x, 2)),
    sums_of_four=_define("sums_of_four(Tensor x, int divisor) -> Tensor", lambda x, _: _map(x, 0.5)),
)

_attend = _define("attend(Tensor q, Tensor k, Tensor v) -> Tensor", lambda q, k, v: torch.empty_like(q))
_attend_backward = _define(
    "attend_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y) -> (Tensor, Tensor, Tensor)",
    lambda dy, q, k, v, y: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
)
LAUNCHES = {"attend_backward": 3}  # sums of dy · y, the gradients, and the conversion of that of q


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = _attend(q, k, v)
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _attend_backward(dy, *ctx.saved_tensors)


@contextmanager
def cuda_forms() -> Iterator[None]:
    """Let the layers choose the forms that CUDA has."""

    def kernels(x: Tensor) -> Any:
        return KERNELS if x.numel() >= device._LEAST_ELEMENTS else None

    def kernels_exist(x: Tensor) -> bool:
        return True

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
        return _FlashAttention.apply(q, k, v)

    with ExitStack() as stack:
        for module in (batch_norm, bias, resample):
            stack.enter_context(mock.patch.object(module, "kernels", kernels))
        # A mock would keep the maps that it was called with.
        stack.enter_context(mock.patch.object(bias, "_adds_apart", new=kernels_exist))
        served = lambda values: values.dtype == torch.bfloat16 and values.shape[1] <= 256  # noqa: E731
        stack.enter_context(mock.patch.object(attention, "_attends_blockwise", served))
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attend))
        yield
