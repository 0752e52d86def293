"""Residual blocks of the two networks (Miyato & Koyama 2018; as in brain-research/self-attention-gan)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sagan.batch_norm import Groups, conditional
from sagan.config import ModelConfig
from sagan.rectifier import rectify, rectify_
from sagan.resample import conv_down, double, halve, up_conv
from sagan.spectral_norm import Conv2d, Spectral, SpectralNorm, TransposedConv2d


class GeneratorBlock(nn.Module):
    """Residual block that doubles height and width.

    The main path is batch norm, ReLU, ×2, convolution, batch norm, ReLU, convolution. The skip path is a 1×1
    convolution, then ×2.
    """

    def __init__(self, in_: int, out: int, config: ModelConfig, spectral: Spectral | None) -> None:
        super().__init__()
        self.slope = config.slope_g
        self.norm1 = conditional(in_, config.known_num_classes, config.batch_norm_eps)
        self.conv1 = TransposedConv2d(in_, out, spectral)
        self.norm2 = conditional(out, config.known_num_classes, config.batch_norm_eps)
        self.conv2 = Conv2d(out, out, 3, spectral)
        self.skip = Conv2d(in_, out, 1, spectral)
        _scale(config.init_gain, self.conv1, self.conv2)

    def forward(self, x: Tensor, y: Tensor | None, groups: Groups | None) -> Tensor:
        """Return [b, out, 2H, 2W] for x [b, in, H, W]. `y` and `groups` are those of `BatchNorm.forward`."""
        h = up_conv(self.norm1(x, y, groups, self.slope), self.conv1.kernel, self.conv1.bias)
        h = self.conv2(self.norm2(h, y, groups, self.slope))
        # A 1×1 convolution commutes with nearest upsampling. Before the upsampling it costs a quarter.
        return h.add_(double(self.skip(x)))


class DiscriminatorBlock(nn.Module):
    """Residual block that halves height and width where `down` is true.

    The main path is ReLU, convolution, ReLU, convolution, average pooling. The skip path is average pooling and a 1×1
    convolution, or the identity where the shapes of input and output agree. The first block of a network has no ReLU
    before its first convolution.
    """

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
        """Return [b, out, H/2, W/2] for x [b, in, H, W], or [b, out, H, W] where `down` is false."""
        # The input of the first block is pixels. In other blocks the ReLU is not in place, because the skip reads x.
        h = self.conv1(x if self.first else rectify(x, self.slope))
        h = rectify_(h, self.slope)
        h = conv_down(h, self.conv2.kernel, self.conv2.bias) if self.down else self.conv2(h)
        # A 1×1 convolution commutes with average pooling. After the pooling it costs a quarter.
        skip = halve(x) if self.down else x
        return h.add_(skip if self.skip is None else self.skip(skip))


@torch.no_grad()
def _scale(gain: float, *convolutions: SpectralNorm) -> None:
    """Multiply the weights of the convolutions by `gain`."""
    for convolution in convolutions:
        convolution.weight.mul_(gain)
