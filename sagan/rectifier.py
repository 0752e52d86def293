"""Rectifiers: ReLU, and leaky ReLU where the negative slope is not 0."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rectify(x: Tensor, slope: float) -> Tensor:
    """Apply leaky ReLU with the negative slope `slope`, or ReLU where `slope` is 0."""
    return F.leaky_relu(x, slope) if slope else F.relu(x)


def rectify_(x: Tensor, slope: float) -> Tensor:
    """Apply `rectify` in place. Call it only where nothing else reads x."""
    return F.leaky_relu_(x, slope) if slope else F.relu_(x)


def rectifier_gradient(grad: Tensor, y: Tensor, slope: float) -> Tensor:
    """Return the gradient with respect to x of y = rectify(x, slope), for the gradient with respect to y."""
    if slope:
        return torch.ops.aten.leaky_relu_backward(grad, y, slope, True)
    return torch.ops.aten.threshold_backward(grad, y, 0.0)
