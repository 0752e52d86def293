"""Nominal cost of a model.

All functions count the multiplications of the formulas as they are written. Savings of the implementation do not count.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from sagan.attention import value_channels
from sagan.blocks import control_shape
from sagan.config import AttentionForm, ModelConfig, ResidualForm
from sagan.discriminator import Discriminator
from sagan.generator import Generator


def parameters(config: ModelConfig) -> tuple[int, int]:
    """Return the number of trainable scalars of the generator and of the discriminator."""

    def count(network: type[nn.Module]) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in network(config).parameters())

    return count(Generator), count(Discriminator)


def forward_macs(config: ModelConfig) -> tuple[int, int]:
    """Return the multiply-accumulates of the forward pass of one image, for the generator and for the discriminator.

    The count includes convolutions, linear layers and attention products. Convolutions and resampling are separate
    steps, as in the formulas.
    """
    if config.architecture == "dcgan":
        return _dcgan_macs(config)
    if config.architecture == "acgan":
        return _acgan_macs(config)
    size = config.first_size
    generator = config.z_dim * size**2 * config.widths_g[0]
    for in_, out in pairwise(config.widths_g):
        size *= 2
        generator += size**2 * (9 * in_ * out + 9 * out * out + in_ * out)
        generator += _attention(config.attention_form, out, size) if size in config.attention_sizes else 0
    generator += size**2 * 9 * config.widths_g[-1] * 3

    discriminator, in_ = 0, 3
    for i, (out, down) in enumerate(config.widths_d):
        hidden = in_ if config.thin_d and i else out
        discriminator += size**2 * (9 * in_ * hidden + 9 * hidden * out)
        after = size // 2 if down else size
        if down or in_ != out:
            discriminator += (after if i == 0 else size) ** 2 * in_ * out
        in_, size = out, after
        if down and size in config.attention_sizes:
            discriminator += _attention(config.attention_form, out, size)
    return generator, discriminator + _heads(config, in_)


def _dcgan_macs(config: ModelConfig) -> tuple[int, int]:
    size = config.first_size
    generator = config.z_dim * size**2 * config.widths_g[0]
    for in_, out in pairwise([*config.widths_g, 3]):
        generator += size**2 * 25 * in_ * out  # a transposed convolution at stride 2 multiplies each input once per tap
        size *= 2
        generator += _attention(config.attention_form, out, size) if size in config.attention_sizes else 0

    discriminator, in_ = 0, 3
    for out, _ in config.widths_d:
        size //= 2
        discriminator += size**2 * 25 * in_ * out
        discriminator += _attention(config.attention_form, out, size) if size in config.attention_sizes else 0
        in_ = out
    return generator, discriminator + _heads(config, in_ * size**2)


def _acgan_macs(config: ModelConfig) -> tuple[int, int]:
    size = config.first_size
    generator = config.z_dim * size**2 * config.widths_g[0]
    for in_, out in pairwise(config.widths_g):
        generator += size**2 * 25 * in_ * out
        size = 2 * size + 3
    generator += size**2 * 64 * config.widths_g[-1] * 3

    discriminator, in_, size = 0, 3, config.known_resolution
    for out, down in config.widths_d:
        size = config.next_size_d(size, down)
        discriminator += size**2 * 9 * in_ * out
        in_ = out
    return generator, discriminator + _heads(config, in_ * size**2)


def _heads(config: ModelConfig, features: int) -> int:
    """Return the multiply-accumulates of the discriminator's last layers on that many features."""
    projection = 1 if config.known_num_classes else 0
    of_labels = config.known_num_classes if config.condition_d == "classifier" else projection
    return features * (1 + of_labels)


def _attention(form: AttentionForm | ResidualForm, channels: int, size: int) -> int:
    """Return the multiply-accumulates of self-attention, or of its control, on a feature map of size × size."""
    positions = size**2
    if form == "residual_1x1" or form == "residual_3x3":
        side, hidden = control_shape(form, channels)
        return positions * side**2 * 2 * channels * hidden
    keys = positions // 4 if form == "released" else positions
    values = value_channels(form, channels)
    output = 0 if form == "first" else values
    projections = positions * channels * (channels // 8 + channels // 8 + values + output)
    return projections + positions * keys * (channels // 8 + values)


def step_flop_per_image(config: ModelConfig, n_dis: int = 1) -> float:
    """Return the nominal FLOP of a training step per real image.

    G and D are the multiply-accumulates of a forward pass. With one discriminator update per generator update, a step
    takes 2 · (4 G + 8 D). With `n_dis` discriminator updates, the generator's update (3 G + 2 D) is spread over n_dis
    images.
    """
    g, d = forward_macs(config)
    return 2 * ((g + 6 * d) + (3 * g + 2 * d) / n_dis)
