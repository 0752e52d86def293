"""Discriminator with projection (Miyato & Koyama 2018; as in brain-research/self-attention-gan) or a classifier."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagan.batch_norm import Groups
from sagan.blocks import DiscriminatorBlock, ShrinkingBlock, StridedBlock, attention_block
from sagan.config import ModelConfig
from sagan.dropout import drop_half, mask_bytes
from sagan.rectifier import rectify
from sagan.spectral_norm import Embedding, Linear, Spectral


class Discriminator(nn.Module):
    """Network that maps an image and its label to one logit.

    The label enters by projection, or a classifier says how likely it is (AC-GAN, Odena et al. 2017). An unconditional
    model has no labels. Residual networks sum the last feature map over its pixels and have no batch norm. DCGAN and
    AC-GAN's own layers have batch norm, and flatten the map.

    Attributes:
        dropped: numbers of values of the feature maps of an image that dropout changes in training.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        spectral = config.spectral if config.spectral_norm_d else None
        self.slope, self.residual = config.slope_d, config.architecture == "resnet"
        self.dropped: list[int] = []
        blocks: list[nn.Module] = []
        in_, size = 3, config.known_resolution
        for out, down in config.widths_d:
            blocks.append(_block(in_, out, config, spectral, down=down, first=not blocks))
            in_, size = out, config.next_size_d(size, down)
            if down and size in config.attention_sizes:
                blocks.append(attention_block(out, config, spectral, self.slope))
            if config.architecture == "acgan":
                self.dropped.append(in_ * size**2)
        self.blocks = nn.Sequential(*blocks)
        width = in_ if self.residual else in_ * size**2
        self.linear = Linear(width, 1, spectral)
        num_classes, projects = config.known_num_classes, config.condition_d == "projection"
        self.embedding = Embedding(num_classes, width, spectral) if num_classes and projects else None
        self.classifier = Linear(width, num_classes, spectral) if num_classes and not projects else None

    def forward(self, x: Tensor, y: Tensor | None, groups: Groups | None = None, masks: Tensor | None = None) -> Tensor:
        """Return the logits, [b] and float32 at least. With a classifier, return [b, 2]: the logits, and log p(y | x).

        Args:
            x: images, float [b, 3, H, W] in [−1, 1].
            y: labels, int64 [b]; None for an unconditional model.
            groups: batch-norm groups of a training forward, as for the generator. A network without batch norm ignores
                them.
            masks: masks of the maps of `dropped`, as `dropout.draw_masks` returns them; None for no dropout.
        """
        if masks is None:
            of_map: Iterator[Tensor | None] = itertools.repeat(None)
        else:
            of_map = iter(masks.split(mask_bytes(self.dropped), dim=1))
        for block in self.blocks:
            if isinstance(block, ShrinkingBlock):
                x = block(x, groups, None if block.norm is None else next(of_map))
            else:
                x = block(x, groups) if isinstance(block, StridedBlock) else block(x)
        h = rectify(x, self.slope)
        if (last := next(of_map)) is not None:
            h = drop_half(h, last)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(h.dtype, torch.float32)
            features = h.sum((2, 3), dtype=dtype) if self.residual else h.flatten(1).to(dtype)
            logits = self.linear(features).squeeze(1)
            if self.embedding is not None:
                logits = logits + (features * self.embedding(y)).sum(1)
            if self.classifier is not None:
                assert y is not None
                log_likelihoods = -F.cross_entropy(self.classifier(features), y, reduction="none")
                return torch.stack([logits, log_likelihoods], dim=1)
        return logits


def _block(in_: int, out: int, config: ModelConfig, spectral: Spectral | None, *, down: bool, first: bool) -> nn.Module:
    """Return the next block of the configuration's architecture."""
    if config.architecture == "resnet":
        return DiscriminatorBlock(in_, out, config, spectral, down=down, first=first)
    if config.architecture == "dcgan":
        return StridedBlock(in_, out, config, spectral, first=first)
    return ShrinkingBlock(in_, out, config, spectral, down=down, first=first)
