"""Random values in float64, and the tolerance of comparisons between them."""

from __future__ import annotations

import torch

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 against float64 in another order of operations


def rand(*shape: int, grad: bool = False) -> torch.Tensor:
    """float64 of N(0, 1)."""
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)
