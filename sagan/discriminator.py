"""Projection discriminator (Miyato & Koyama 2018; as in brain-research/self-attention-gan)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sagan.blocks import DiscriminatorBlock, attention_block
from sagan.config import ModelConfig
from sagan.rectifier import rectify
from sagan.spectral_norm import Embedding, Linear


class Discriminator(nn.Module):
    """Network that maps an image and its label to one logit.

    The label enters by projection. An unconditional model has no labels. The network has no batch norm.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        spectral = config.spectral if config.spectral_norm_d else None
        self.slope = config.slope_d
        blocks: list[nn.Module] = []
        in_, size = 3, config.known_resolution
        for out, down in config.widths_d:
            blocks.append(DiscriminatorBlock(in_, out, config, spectral, down=down, first=not blocks))
            in_, size = out, size // 2 if down else size
            if down and size in config.attention_sizes:
                blocks.append(attention_block(out, config, spectral, self.slope))
        self.blocks = nn.Sequential(*blocks)
        self.linear = Linear(in_, 1, spectral)
        self.embedding = Embedding(config.known_num_classes, in_, spectral) if config.known_num_classes else None

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the logits, [b] and float32 at least.

        Args:
            x: images, float [b, 3, H, W] in [−1, 1].
            y: labels, int64 [b]; None for an unconditional model.
        """
        h = rectify(self.blocks(x), self.slope)
        with torch.autocast(x.device.type, enabled=False):
            features = h.sum((2, 3), dtype=torch.promote_types(h.dtype, torch.float32))
            logits = self.linear(features).squeeze(1)
            if self.embedding is not None:
                logits = logits + (features * self.embedding(y)).sum(1)
        return logits
