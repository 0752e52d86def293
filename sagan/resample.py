"""A 3×3 convolution with nearest up- or average down-sampling, at a quarter of the multiplications.

Both identities are exact, borders included, and use the 3×3 weight itself, so σ is that of the plain convolution.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def up_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv3x3(nearest ×2 (x)): a strided transposed convolution, then a 2×2 box filter."""
    transposed = 4 * weight.flip(2, 3).transpose(0, 1)
    return F.avg_pool2d(F.conv_transpose2d(x, transposed, bias, stride=2), 2, stride=1)


def conv_down(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """avg_pool2(conv3x3(x)): a 2×2 box filter, then a strided convolution."""
    return F.conv2d(F.avg_pool2d(x, 2, stride=1, padding=1), weight, bias, stride=2)
