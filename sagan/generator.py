"""The generator: that of brain-research/self-attention-gan, with widths for other resolutions."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagan.attention import SelfAttention
from sagan.batch_norm import LAST_DECAY, BatchNorm, Groups
from sagan.blocks import GeneratorBlock
from sagan.config import ModelConfig
from sagan.spectral_norm import Conv2d, Linear


class Generator(nn.Module):
    """z (and a class) → image in [−1, 1].

    With `spectral_norm=False` the same network expects weights that are already divided by their σ.
    """

    def __init__(self, config: ModelConfig, *, spectral_norm: bool = True) -> None:
        super().__init__()
        widths = config.widths_g
        self.linear = Linear(config.z_dim, 16 * widths[0], spectral_norm=spectral_norm)
        blocks: list[nn.Module] = []
        size = 4
        for in_, out in pairwise(widths):
            blocks.append(GeneratorBlock(in_, out, config.labels, spectral_norm=spectral_norm))
            size *= 2
            if size in config.attention_sizes:
                blocks.append(SelfAttention(out, spectral_norm=spectral_norm))
        self.blocks = nn.ModuleList(blocks)
        self.norm = BatchNorm(widths[-1], LAST_DECAY)
        self.conv = Conv2d(widths[-1], 3, 3, spectral_norm=spectral_norm)

    def forward(self, z: Tensor, y: Tensor | None, groups: Groups | None = None) -> Tensor:
        """z float [b, z_dim], y int64 [b] (None when unconditional) → [b, 3, H, W].

        With `groups` batch norm uses the statistics of this batch (training; collective where a group spans ranks),
        without it the running statistics.
        """
        h = self.linear(z).view(len(z), -1, 4, 4).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            h = block(h, y, groups) if isinstance(block, GeneratorBlock) else block(h)
        return torch.tanh(self.conv(F.relu(self.norm(h, None, groups))))
