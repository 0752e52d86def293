"""The networks and their gradients are those of the formulas, written plainly (tests/benchmarks/_plain_sagan.py).

Float64, random weights and σ far from convergence: resampling folded into convolutions, weights kept as kernels read
them, in-place rectifiers, custom gradients and grouped batch norm change nothing beyond rounding.
"""

import pytest
import torch

from sagan import ModelConfig, OptimConfig, TrainState, World
from sagan.batch_norm import Groups
from sagan.losses import discriminator_hinge, generator_hinge
from tests.benchmarks import _plain_sagan

BOUND = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize(("resolution", "attention", "batch"), [(32, (16,), 6), (64, (8, 32), 6), (128, (64,), 2)])
def test_losses_and_all_gradients_equal_the_formulas(resolution, attention, batch):
    config = ModelConfig(
        resolution=resolution, num_classes=5, channels_g=8, channels_d=8, z_dim=12, attention=attention
    )
    state = TrainState(config, OptimConfig(), seed=0).to(torch.float64)
    torch.manual_seed(1)
    for network in (state.generator, state.discriminator):
        for name, parameter in network.named_parameters():
            if name.endswith(("gamma", "bias")) or ".norm" in name:  # not at the values where they hide
                torch.nn.init.normal_(parameter, 0.5, 0.2)
    plain = _plain_sagan.Step(config, OptimConfig(), "cpu")
    pairs = {"generator": plain.generator.double(), "discriminator": plain.discriminator.double()}
    for name, theirs in pairs.items():
        _plain_sagan.copy_from(getattr(state, name), theirs)

    real, y = torch.rand(batch, 3, resolution, resolution, dtype=torch.float64) * 2 - 1, torch.arange(batch) % 5
    z, y_fake = torch.randn(batch, 12, dtype=torch.float64), torch.tensor([4, 0, 0, 2, 1, 3])[:batch]
    groups = Groups(range(batch), 1, World(), torch.device("cpu"))
    ours, theirs = state.generator(z, y_fake, groups), pairs["generator"](z, y_fake)
    torch.testing.assert_close(ours, theirs, **BOUND)

    loss = discriminator_hinge(state.discriminator(real, y), state.discriminator(ours.detach(), y_fake))
    logits = pairs["discriminator"](real, y), pairs["discriminator"](theirs.detach(), y_fake)
    expected = (torch.relu(1 - logits[0]) + torch.relu(1 + logits[1])).sum()
    torch.testing.assert_close(loss, expected, **BOUND)
    loss.backward()
    expected.backward()
    same_gradients(state.discriminator, pairs["discriminator"])

    loss, expected = generator_hinge(state.discriminator(ours, y_fake)), -pairs["discriminator"](theirs, y_fake).sum()
    torch.testing.assert_close(loss, expected, **BOUND)
    loss.backward()
    expected.backward()
    same_gradients(state.generator, pairs["generator"])


def same_gradients(ours, theirs):
    mine, expected = _plain_sagan.gradients(ours, theirs)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-10 * max(1.0, float(expected.abs().max())))
