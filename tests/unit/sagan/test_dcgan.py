"""DCGAN's networks and their gradients are those of torch's own layers, in float64."""

import pytest
import torch
from torch import nn

from sagan import ModelConfig, OptimConfig, TrainState, World, batch_norm
from sagan.batch_norm import Groups
from sagan.losses import Loss
from sagan.spectral_norm import SpectralNorm
from tests.unit.sagan.torch_layers import pairs, same_gradients
from tests.unit.sagan.training import run

BOUND = {"rtol": 1e-10, "atol": 1e-10}
CONFIG = ModelConfig(
    resolution=32,
    num_classes=0,
    architecture="dcgan",
    z_dim=6,
    channels_g=3,
    channels_d=2,
    slope_d=0.2,
    spectral_norm_g=False,
    spectral_norm_d=False,
    init_std=0.02,
)
GROUPS = Groups(range(6), 1, World(), torch.device("cpu"))


def plain_generator(z_dim, c, size):
    layers = [nn.Linear(z_dim, 8 * c * size**2), nn.Unflatten(1, (8 * c, size, size))]
    for in_, out in ((8 * c, 4 * c), (4 * c, 2 * c), (2 * c, c), (c, 3)):
        layers += [nn.BatchNorm2d(in_), nn.ReLU(), nn.ConvTranspose2d(in_, out, 5, 2, 2, output_padding=1)]
    return nn.Sequential(*layers, nn.Tanh())


def plain_discriminator(c, size):
    layers = [nn.Conv2d(3, c, 5, 2, 2), nn.LeakyReLU(0.2)]
    for in_, out in ((c, 2 * c), (2 * c, 4 * c), (4 * c, 8 * c)):
        layers += [nn.Conv2d(in_, out, 5, 2, 2), nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * c * size**2, 1), nn.Flatten(0))


@pytest.fixture
def both():
    """The state, with weights that hide nothing, and torch's networks with the same."""
    state = TrainState(CONFIG, OptimConfig(loss="bce"), seed=0).to(torch.float64)
    generator, discriminator = plain_generator(6, 3, 2).double(), plain_discriminator(2, 2).double()
    torch.manual_seed(1)
    for ours, theirs in ((state.generator, generator), (state.discriminator, discriminator)):
        for a, b, layout in pairs(ours, theirs):
            nn.init.normal_(a, 0.3, 0.4)
            b.data.copy_(layout(a.data))
    return state, generator, discriminator


def test_losses_and_all_gradients_equal_those_of_torchs_layers(both):
    state, generator, discriminator = both
    real, z = torch.rand(6, 3, 32, 32, dtype=torch.float64) * 2 - 1, torch.randn(6, 6, dtype=torch.float64)
    ours, theirs = state.generator(z, None, GROUPS), generator(z)
    torch.testing.assert_close(ours, theirs, **BOUND)

    # Real and generated images are normalised apart, though one forward takes both.
    outputs = state.discriminator(torch.cat([real, ours.detach()]), None, GROUPS.twice()).split(6)
    expected = discriminator(real), discriminator(theirs.detach())
    for output, logits in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, logits, **BOUND)
    loss = Loss("bce").discriminator(*outputs)
    entropy = nn.BCEWithLogitsLoss(reduction="sum")
    ones = torch.ones_like(expected[0])
    torch.testing.assert_close(loss, entropy(expected[0], ones) + entropy(expected[1], 0 * ones), **BOUND)
    loss.backward()
    (entropy(expected[0], ones) + entropy(expected[1], 0 * ones)).backward()
    same_gradients(state.discriminator, discriminator)

    loss = Loss("bce").generator(state.discriminator(ours, None, GROUPS))
    expected = entropy(discriminator(theirs), ones)
    torch.testing.assert_close(loss, expected, **BOUND)
    loss.backward()
    expected.backward()
    same_gradients(state.generator, generator)


def test_a_step_moves_the_running_averages_of_both_networks():
    """Those of the discriminator towards the mean over real and generated images."""
    state = TrainState(CONFIG, OptimConfig(loss="bce"), seed=1)
    run(state, 1)
    for network in (state.generator, state.discriminator):
        for norm in batch_norm.layers(network):
            assert norm.running_mean.abs().max() > 0
            assert norm.running_var.max() < 1  # small initial weights have small activations
    # Without groups, the logit of an image does not depend on the images beside it.
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(state.discriminator(images, None)[:1], state.discriminator(images[:1], None))


def test_initial_weights_are_normal_with_the_given_deviation():
    state = TrainState(CONFIG, OptimConfig(), seed=1)
    for network in (state.generator, state.discriminator):
        layers = [m for m in network.modules() if isinstance(m, SpectralNorm)]
        weights = torch.cat([layer.weight.flatten() for layer in layers])
        assert 0.018 < weights.std() < 0.022
        assert 2.5 < (weights / weights.std()).square().square().mean() < 3.5  # the fourth moment of a normal variable
        for name, parameter in network.named_parameters():
            if ".norm" in name or name.startswith("norm"):
                assert torch.equal(parameter, torch.ones_like(parameter) * name.endswith("weight"))


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
@pytest.mark.parametrize("classes", [0, 3])
def test_both_networks_exist_at_every_resolution_with_and_without_classes(resolution, classes):
    config = ModelConfig(resolution=resolution, num_classes=classes, architecture="dcgan", channels_g=2, channels_d=2)
    assert config.attention_sizes == ()
    state = TrainState(config, OptimConfig(), seed=0)
    y = torch.tensor([0, 1]) if classes else None
    images = state.generator(torch.randn(2, 128), y)
    assert images.shape == (2, 3, resolution, resolution)
    assert state.discriminator(images, y).shape == (2,)
