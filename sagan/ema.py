"""Exponential moving average of the generator's raw weights, biases and tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    """The average before its first update."""
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


@torch.no_grad()
def update(average: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · weights, in place; `decay` 0 copies."""
    weights = dict(network.named_parameters())
    torch._foreach_lerp_(list(average.values()), [weights[name] for name in average], 1 - decay)
