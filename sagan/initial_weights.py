"""Initial values of the networks' weights. Biases start at 0."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def initial_weight(*shape: int) -> Tensor:
    """Return Glorot-uniform values, float32 (official code), for a weight [out, in, …]."""
    return nn.init.xavier_uniform_(torch.empty(shape))
