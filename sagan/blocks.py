"""Blocks of the networks: residual (Miyato & Koyama 2018; brain-research/self-attention-gan), DCGAN's, AC-GAN's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sagan.attention import SelfAttention
from sagan.batch_norm import BatchNorm, Groups, conditional
from sagan.config import ModelConfig, ResidualForm, Spectral
from sagan.dropout import drop_half
from sagan.rectifier import rectify
from sagan.resample import conv_down, double, halve, up_conv
from sagan.spectral_norm import (
    Conv2d,
    SpectralNorm,
    StridedConv2d,
    StridedTransposedConv2d,
    TransposedConv2d,
    Window,
)

DOUBLE = HALVE = Window(side=5, stride=2, padding=2, output_padding=1)
"""Windows of DCGAN's convolutions."""
GROW, GROW_LAST = Window(side=5, stride=2, padding=0), Window(side=8, stride=2, padding=0)
"""Windows of AC-GAN's transposed convolutions: from size s to 2s + 3, and in the last layer to 2s + 6."""
_HALVE_AC, _SHRINK = Window(side=3, stride=2, padding=1), Window(side=3, stride=1, padding=0)


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
        h = self.conv1(x if self.first else rectify(x, self.slope), self.slope)
        h = conv_down(h, self.conv2.kernel, self.conv2.bias) if self.down else self.conv2(h)
        # A 1×1 convolution commutes with average pooling. After the pooling it costs a quarter.
        skip = halve(x) if self.down else x
        return h.add_(skip if self.skip is None else self.skip(skip))


class TransposedBlock(nn.Module):
    """Block of DCGAN's generator that doubles height and width: batch norm, ReLU, 5×5 transposed convolution."""

    def __init__(self, in_: int, out: int, config: ModelConfig, spectral: Spectral | None) -> None:
        super().__init__()
        self.slope = config.slope_g
        self.norm = conditional(in_, config.known_num_classes, config.batch_norm_eps)
        self.conv = StridedTransposedConv2d(in_, out, spectral, DOUBLE)

    def forward(self, x: Tensor, y: Tensor | None, groups: Groups | None) -> Tensor:
        """Return [b, out, 2H, 2W] for x [b, in, H, W]. `y` and `groups` are those of `BatchNorm.forward`."""
        return self.conv(self.norm(x, y, groups, self.slope))


class StridedBlock(nn.Module):
    """Block of DCGAN's discriminator that halves height and width: leaky ReLU, 5×5 convolution, batch norm.

    The first block of a network is the convolution alone.
    """

    def __init__(self, in_: int, out: int, config: ModelConfig, spectral: Spectral | None, *, first: bool) -> None:
        super().__init__()
        self.slope = config.slope_d
        self.conv = StridedConv2d(in_, out, spectral, HALVE)
        self.norm = None if first else BatchNorm(out, config.batch_norm_eps)

    def forward(self, x: Tensor, groups: Groups | None) -> Tensor:
        """Return [b, out, H/2, W/2] for x [b, in, H, W]. `groups` are those of `BatchNorm.forward`."""
        if self.norm is None:
            return self.conv(x)
        return self.norm(self.conv(rectify(x, self.slope)), None, groups)


class GrowingBlock(nn.Module):
    """Block of AC-GAN's generator from size s to 2s + 3: batch norm, ReLU, 5×5 transposed convolution without a bias.

    The first block of a network is the convolution alone. The label enters before the blocks.
    """

    def __init__(self, in_: int, out: int, config: ModelConfig, spectral: Spectral | None, *, first: bool) -> None:
        super().__init__()
        self.slope = config.slope_g
        self.norm = None if first else BatchNorm(in_, config.batch_norm_eps)
        self.conv = StridedTransposedConv2d(in_, out, spectral, GROW, bias=False)

    def forward(self, x: Tensor, y: Tensor | None, groups: Groups | None) -> Tensor:
        """Return [b, out, 2H + 3, 2W + 3] for x [b, in, H, W]. `y` and `groups` are those of `BatchNorm.forward`."""
        return self.conv(x if self.norm is None else self.norm(x, y, groups, self.slope))


class ShrinkingBlock(nn.Module):
    """Block of AC-GAN's discriminator: leaky ReLU, dropout, 3×3 convolution without a bias, batch norm.

    It halves height and width, rounded up, where `down` is true. Otherwise it takes 2 off each. The first block of a
    network is the convolution alone.
    """

    def __init__(
        self, in_: int, out: int, config: ModelConfig, spectral: Spectral | None, *, down: bool, first: bool
    ) -> None:
        super().__init__()
        self.slope = config.slope_d
        self.conv = StridedConv2d(in_, out, spectral, _HALVE_AC if down else _SHRINK, bias=False)
        self.norm = None if first else BatchNorm(out, config.batch_norm_eps)

    def forward(self, x: Tensor, groups: Groups | None, masks: Tensor | None) -> Tensor:
        """Return the convolved map of x [b, in, H, W].

        Args:
            x: float [b, in, H, W].
            groups: those of `BatchNorm.forward`.
            masks: masks of x for `drop_half`; None for no dropout.
        """
        if self.norm is None:
            return self.conv(x)
        h = rectify(x, self.slope)
        return self.norm(self.conv(h if masks is None else drop_half(h, masks)), None, groups)


def control_shape(form: ResidualForm, channels: int) -> tuple[int, int]:
    """Return k, the side of the kernels of a residual control, and the number of channels between its convolutions.

    Two k×k convolutions C → 5C / 8k² → C have the 1.25 C² weights of released attention, where C has `channels`. The
    inner channels are rounded.
    """
    side = 1 if form == "residual_1x1" else 3
    return side, max(1, round(5 * channels / (8 * side**2)))


class ResidualControl(nn.Module):
    """Residual block in the place of self-attention (paper, table 1): y = x + γ · c₂(ReLU(c₁(ReLU(x)))).

    The paper says that the block has as many parameters as self-attention, and gives no layout. Here it shares with
    `SelfAttention` all that is not attention: γ is learned and starts at 0, and the convolutions have no biases.

    Args:
        channels: C, the number of channels of x.
        spectral: how the convolutions are normalised; None for plain convolutions.
        form: the size of the kernels.
        slope: negative slope of the rectifiers.
    """

    def __init__(self, channels: int, spectral: Spectral | None, form: ResidualForm, slope: float = 0.0) -> None:
        super().__init__()
        side, hidden = control_shape(form, channels)
        self.slope = slope
        self.conv1 = Conv2d(channels, hidden, side, spectral, bias=False)
        self.conv2 = Conv2d(hidden, channels, side, spectral, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return y [b, C, H, W] for x [b, C, H, W]."""
        h = self.conv2(self.conv1(rectify(x, self.slope), self.slope))
        return torch.addcmul(x, self.gamma.to(x.dtype), h)


def attention_block(
    channels: int, config: ModelConfig, spectral: Spectral | None, slope: float
) -> SelfAttention | ResidualControl:
    """Return the layer that `config` puts on a feature map in `attention`: self-attention, or its control."""
    form = config.attention_form
    if form == "residual_1x1" or form == "residual_3x3":
        return ResidualControl(channels, spectral, form, slope)
    return SelfAttention(channels, spectral, form)


@torch.no_grad()
def _scale(gain: float, *convolutions: SpectralNorm) -> None:
    """Multiply the weights of the convolutions by `gain`."""
    for convolution in convolutions:
        convolution.weight.mul_(gain)
