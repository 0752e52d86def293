"""Exponential moving average (ema) of the generator's parameters: weights before division by σ, biases and tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the network's parameters by name: the moving average before its first update."""
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


@torch.no_grad()
def update(ema: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    """Update in place: ema ← decay · ema + (1 − decay) · weights. With `decay` 0 this copies the weights."""
    weights = dict(network.named_parameters())
    torch._foreach_lerp_(list(ema.values()), [weights[name] for name in ema], 1 - decay)
