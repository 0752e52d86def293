"""Generator of brain-research/self-attention-gan, with widths for other resolutions, or of DCGAN or AC-GAN."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from sagan.batch_norm import LAST_DECAY, BatchNorm, Groups
from sagan.blocks import DOUBLE, GROW_LAST, GeneratorBlock, GrowingBlock, TransposedBlock, attention_block
from sagan.config import ModelConfig, Spectral
from sagan.spectral_norm import Conv2d, Embedding, Linear, StridedTransposedConv2d


class Generator(nn.Module):
    """Network that maps a latent vector and a label to an image in [−1, 1].

    Args:
        config: configuration of the networks.
        folded: build the network without spectral norm, for weights that `spectral_norm.fold` has divided by σ.
    """

    def __init__(self, config: ModelConfig, *, folded: bool = False) -> None:
        super().__init__()
        spectral = config.spectral if config.spectral_norm_g and not folded else None
        widths, self.slope = config.widths_g, config.slope_g
        self.size = size = config.first_size
        self.linear = Linear(config.z_dim, size**2 * widths[0], spectral)
        # AC-GAN: the layer on z and the one-hot label is the sum of a layer on z and a row for the label.
        has_rows = config.architecture == "acgan" and config.known_num_classes
        self.embedding = Embedding(config.known_num_classes, size**2 * widths[0], None) if has_rows else None
        blocks: list[nn.Module] = []
        for in_, out in pairwise(widths):
            blocks.append(_block(in_, out, config, spectral, first=not blocks))
            size *= 2
            if size in config.attention_sizes:
                blocks.append(attention_block(out, config, spectral, self.slope))
        self.blocks = nn.ModuleList(blocks)
        self.norm = BatchNorm(widths[-1], config.batch_norm_eps, LAST_DECAY)
        self.conv = _last_layer(widths[-1], config, spectral)

    def forward(self, z: Tensor, y: Tensor | None, groups: Groups | None = None) -> Tensor:
        """Return images, float [b, 3, H, W] in [−1, 1].

        Args:
            z: latents, float [b, z_dim].
            y: labels, int64 [b]; None for an unconditional model.
            groups: batch-norm groups of a training forward, which uses the statistics of this batch. All ranks must run
                it where a group spans ranks. With None, batch norm uses its running averages, and one rank may run the
                forward alone.
        """
        h = self.linear(z)
        if self.embedding is not None:
            h = h + self.embedding(y)
        h = h.view(len(z), -1, self.size, self.size).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            upsamples = isinstance(block, GeneratorBlock | TransposedBlock | GrowingBlock)
            h = block(h, y, groups) if upsamples else block(h)
        return torch.tanh(self.conv(self.norm(h, None, groups, self.slope)))


def _block(in_: int, out: int, config: ModelConfig, spectral: Spectral | None, *, first: bool) -> nn.Module:
    """Return the next block of the configuration's architecture."""
    if config.architecture == "resnet":
        return GeneratorBlock(in_, out, config, spectral)
    if config.architecture == "dcgan":
        return TransposedBlock(in_, out, config, spectral)
    return GrowingBlock(in_, out, config, spectral, first=first)


def _last_layer(channels: int, config: ModelConfig, spectral: Spectral | None) -> Conv2d | StridedTransposedConv2d:
    """Return the layer of the configuration's architecture that makes the image."""
    if config.architecture == "resnet":
        return Conv2d(channels, 3, 3, spectral)
    if config.architecture == "dcgan":
        return StridedTransposedConv2d(channels, 3, spectral, DOUBLE)
    return StridedTransposedConv2d(channels, 3, spectral, GROW_LAST, bias=False)
