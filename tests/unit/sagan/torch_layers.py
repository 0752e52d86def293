"""Compares layers with torch's own layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sagan.spectral_norm import StridedConv2d, StridedTransposedConv2d


def pairs(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]:
    """Our parameter, torch's, and the function that lays ours out as torch's, layer by layer."""
    mine = [m for m in ours.modules() if next(m.parameters(recurse=False), None) is not None]
    plain = [m for m in theirs.modules() if next(m.parameters(recurse=False), None) is not None]
    for a, b in zip(mine, plain, strict=True):
        kernel = isinstance(a, StridedConv2d | StridedTransposedConv2d)
        assert isinstance(a.weight, Tensor)
        assert isinstance(b.weight, Tensor)
        yield a.weight, b.weight, (lambda w: w.permute(0, 3, 1, 2)) if kernel else (lambda w: w)
        if isinstance(a.bias, Tensor):
            assert isinstance(b.bias, Tensor)
            yield a.bias, b.bias, lambda w: w


def same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    for a, b, layout in pairs(ours, theirs):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(layout(a.grad), b.grad, rtol=0, atol=1e-10 * max(1.0, float(b.grad.abs().max())))
