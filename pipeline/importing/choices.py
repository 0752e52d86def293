"""What the tensors of a file do not tell about its generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Choices:
    """Values that the code of a peer, its file, or the user's options give.

    Attributes:
        weights: "ema" for the moving average of the weights, "raw" for the weights themselves.
        batch_norm_eps: Constant that batch norm adds to variances.
        scale_offset: Number that the peer adds to the class-dependent scales of its file.
        channel_order: Order of the channels of the peer's images.
        slope: Negative slope of the rectifiers; 0 is ReLU.
    """

    weights: Literal["ema", "raw"]
    batch_norm_eps: float
    scale_offset: float
    channel_order: Literal["rgb", "bgr"]
    slope: float = 0.0
