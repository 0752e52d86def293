"""Residual blocks of the two networks (Miyato & Koyama 2018; as in brain-research/self-attention-gan)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sagan.batch_norm import Groups, conditional
from sagan.resample import conv_down, up_conv
from sagan.spectral_norm import Conv2d


class GeneratorBlock(nn.Module):
    """Batch norm, ReLU, ×2, conv, batch norm, ReLU, conv; the skip is a 1×1 convolution, then ×2."""

    def __init__(self, in_: int, out: int, classes: int, *, spectral_norm: bool) -> None:
        super().__init__()
        self.norm1 = conditional(in_, classes)
        self.conv1 = Conv2d(in_, out, 3, spectral_norm=spectral_norm)
        self.norm2 = conditional(out, classes)
        self.conv2 = Conv2d(out, out, 3, spectral_norm=spectral_norm)
        self.skip = Conv2d(in_, out, 1, spectral_norm=spectral_norm)

    def forward(self, x: Tensor, y: Tensor | None, groups: Groups | None) -> Tensor:
        h = F.relu(self.norm1(x, y, groups))
        h = up_conv(h, self.conv1.normalised_weight, self.conv1.bias)
        h = self.conv2(F.relu(self.norm2(h, y, groups)))
        # a 1×1 convolution commutes with nearest upsampling and costs a quarter before it
        return h + F.interpolate(self.skip(x), scale_factor=2)


class DiscriminatorBlock(nn.Module):
    """ReLU, conv, ReLU, conv, average pool; the skip is a 1×1 convolution, or nothing where shapes agree."""

    def __init__(self, in_: int, out: int, *, down: bool, first: bool = False, spectral_norm: bool) -> None:
        super().__init__()
        self.down, self.first = down, first
        self.conv1 = Conv2d(in_, out, 3, spectral_norm=spectral_norm)
        self.conv2 = Conv2d(out, out, 3, spectral_norm=spectral_norm)
        self.skip = Conv2d(in_, out, 1, spectral_norm=spectral_norm) if down or in_ != out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x if self.first else F.relu(x))  # the first block sees pixels
        h = F.relu(h)
        h = conv_down(h, self.conv2.normalised_weight, self.conv2.bias) if self.down else self.conv2(h)
        # a 1×1 convolution commutes with average pooling and costs a quarter after it
        skip = F.avg_pool2d(x, 2) if self.down else x
        return h + (skip if self.skip is None else self.skip(skip))
