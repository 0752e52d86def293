"""Standing statistics of batch norm: its mean and variance over generated images, for a finished generator."""

from __future__ import annotations

import torch

from sagan import batch_norm
from sagan.batch_norm import Groups
from sagan.config import ModelConfig
from sagan.generator import Generator
from sagan.random import Purpose, draw_labels, draw_latents
from sagan.ranks import World

_GROUP = 128  # images that one forward normalises together


@torch.no_grad()
def take_standing_statistics(generator: Generator, model: ModelConfig, images: int, seed: int) -> None:
    """Replace the running averages of batch norm by standing statistics.

    Standing statistics are the mean and the variance over `images` fixed latents, in groups of 128 that are combined in
    float64. They depend on the weights, `images` and `seed` alone, and not on how evaluation is batched or distributed.
    """
    norms = batch_norm.layers(generator)
    weight = next(generator.parameters())
    count, mean_sum, square_sum = 0, None, None
    for start in range(0, images, _GROUP):
        positions = range(start, min(start + _GROUP, images))
        z = draw_latents(seed, Purpose.STANDING_Z, positions, model.z_dim).to(weight)
        y = (
            draw_labels(seed, Purpose.STANDING_Y, positions, model.known_num_classes).to(weight.device)
            if model.known_num_classes
            else None
        )
        generator(z, y, Groups(positions, 1, World(), weight.device))
        means = torch.cat([norm.batch_mean for norm in norms]).double() * len(positions)
        variances = torch.cat([norm.batch_var for norm in norms]).double() * len(positions)
        squares = variances + means.square() / len(positions)
        count += len(positions)
        mean_sum = means if mean_sum is None else mean_sum + means
        square_sum = squares if square_sum is None else square_sum + squares
    assert mean_sum is not None
    assert square_sum is not None
    mean = mean_sum / count
    variance = square_sum / count - mean.square()
    sizes = [len(norm.running_mean) for norm in norms]
    for norm, layer_mean, layer_variance in zip(norms, mean.split(sizes), variance.split(sizes), strict=True):
        norm.running_mean.copy_(layer_mean)
        norm.running_var.copy_(layer_variance.clamp(min=0))
