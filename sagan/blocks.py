"""Residual blocks of the two networks (Miyato & Koyama 2018; as in brain-research/self-attention-gan)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagan.batch_norm import Groups, conditional
from sagan.config import ModelConfig
from sagan.resample import conv_down, double, halve, up_conv
from sagan.spectral_norm import Conv2d, Spectral, SpectralNorm, TransposedConv2d


def rectify(x: Tensor, slope: float) -> Tensor:
    """ReLU, leaky where `slope` is above 0."""
    return F.leaky_relu(x, slope) if slope else F.relu(x)


def rectify_(x: Tensor, slope: float) -> Tensor:
    """The same in place: only for what nothing else reads."""
    return F.leaky_relu_(x, slope) if slope else F.relu_(x)


class GeneratorBlock(nn.Module):
    """Batch norm, ReLU, ×2, conv, batch norm, ReLU, conv; the skip is a 1×1 convolution, then ×2."""

    def __init__(self, in_: int, out: int, config: ModelConfig, spectral: Spectral | None) -> None:
        super().__init__()
        self.slope = config.slope_g
        self.norm1 = conditional(in_, config.labels, config.batch_norm_eps)
        self.conv1 = TransposedConv2d(in_, out, spectral)
        self.norm2 = conditional(out, config.labels, config.batch_norm_eps)
        self.conv2 = Conv2d(out, out, 3, spectral)
        self.skip = Conv2d(in_, out, 1, spectral)
        _scale(config.init_gain, self.conv1, self.conv2)

    def forward(self, x: Tensor, y: Tensor | None, groups: Groups | None) -> Tensor:
        h = rectify_(self.norm1(x, y, groups), self.slope)
        h = up_conv(h, self.conv1.kernel, self.conv1.bias)
        h = self.conv2(rectify_(self.norm2(h, y, groups), self.slope))
        # a 1×1 convolution commutes with nearest upsampling and costs a quarter before it
        return h.add_(double(self.skip(x)))


class DiscriminatorBlock(nn.Module):
    """ReLU, conv, ReLU, conv, average pool; the skip is a 1×1 convolution, or nothing where shapes agree."""

    def __init__(
        self, in_: int, out: int, config: ModelConfig, spectral: Spectral | None, *, down: bool, first: bool
    ) -> None:
        super().__init__()
        self.down, self.first, self.slope = down, first, config.slope_d
        hidden = in_ if config.thin_d and not first else out
        self.conv1 = Conv2d(in_, hidden, 3, spectral)
        self.conv2 = Conv2d(hidden, out, 3, spectral)
        self.skip = Conv2d(in_, out, 1, spectral) if down or in_ != out else None
        _scale(config.init_gain, self.conv1, self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        # the first block sees pixels; elsewhere the skip reads x as it is
        h = self.conv1(x if self.first else rectify(x, self.slope))
        h = rectify_(h, self.slope)
        h = conv_down(h, self.conv2.kernel, self.conv2.bias) if self.down else self.conv2(h)
        # a 1×1 convolution commutes with average pooling and costs a quarter after it
        skip = halve(x) if self.down else x
        return h.add_(skip if self.skip is None else self.skip(skip))


@torch.no_grad()
def _scale(gain: float, *convolutions: SpectralNorm) -> None:
    for convolution in convolutions:
        convolution.weight.mul_(gain)
