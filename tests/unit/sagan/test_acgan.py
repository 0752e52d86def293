"""The networks of the first AC-GAN, their gradients and their dropout are those of torch's own layers, in float64."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from sagan import ModelConfig, OptimConfig, TrainState, World, batch_norm
from sagan.batch_norm import Groups
from sagan.dropout import draw_masks, drop_half, mask_bytes
from sagan.losses import Loss
from sagan.random import Purpose
from tests.unit.sagan.torch_layers import pairs, same_gradients
from tests.unit.sagan.training import run

BOUND = {"rtol": 1e-10, "atol": 1e-10}
CONFIG = ModelConfig(
    resolution=128,
    num_classes=3,
    architecture="acgan",
    condition_d="classifier",
    z_dim=5,
    channels_g=2,
    channels_d=1,
    slope_d=0.2,
    spectral_norm_g=False,
    spectral_norm_d=False,
    init_std=0.02,
)
BATCH = 4
GROUPS = Groups(range(BATCH), 1, World(), torch.device("cpu"))
OPTIM = OptimConfig(loss="bce")


class Drop(nn.Module):
    """Dropout with given masks, bool [b, C, H, W]. Without masks it drops nothing."""

    mask = None

    def forward(self, x):
        return x if self.mask is None else torch.where(self.mask, 2 * x, 0)


def plain_generator(width):
    """The layers of clvrai/ACGAN-PyTorch."""
    widths = [m * CONFIG.channels_g for m in (12, 6, 4, 3, 1)]
    layers = [nn.Linear(width, widths[0]), nn.Unflatten(1, (widths[0], 1, 1))]
    for in_, out in pairwise(widths):
        layers += [nn.ConvTranspose2d(in_, out, 5, 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], 3, 8, 2, bias=False), nn.Tanh())


def plain_discriminator():
    layers, in_ = [], 3
    for number, out in enumerate((1, 2, 4, 8, 16, 32)):
        layers.append(nn.Conv2d(in_, out, 3, 1 if number % 2 else 2, 0 if number % 2 else 1, bias=False))
        layers += [nn.BatchNorm2d(out)] if number else []
        layers += [nn.LeakyReLU(0.2), Drop()]
        in_ = out
    return nn.Sequential(*layers, nn.Flatten())


@pytest.fixture
def both():
    """The state, with weights that hide nothing, and torch's networks with the same."""
    state = TrainState(CONFIG, OPTIM, seed=0).to(torch.float64)
    generator = plain_generator(CONFIG.z_dim + CONFIG.num_classes).double()
    blocks = plain_discriminator().double()
    heads = nn.ModuleList([nn.Linear(32 * 13**2, 1), nn.Linear(32 * 13**2, 3)]).double()
    torch.manual_seed(1)
    for network in (state.generator, state.discriminator):
        for parameter in network.parameters():
            nn.init.normal_(parameter, 0.1, 0.2)
    table = state.generator.embedding.weight
    first = generator[0]
    first.weight.data.copy_(torch.cat([state.generator.linear.weight, table.t()], 1))
    first.bias.data.copy_(state.generator.linear.bias)
    for ours, theirs in (
        (nn.ModuleList([state.generator.blocks, state.generator.norm, state.generator.conv]), generator[1:]),
        (state.discriminator.blocks, blocks),
        (nn.ModuleList([state.discriminator.linear, state.discriminator.classifier]), heads),
    ):
        for a, b, layout in pairs(ours, theirs):
            b.data.copy_(layout(a.data))
    return state, generator, blocks, heads


def as_booleans(masks, shapes):
    """The masks of `draw_masks` as one bool tensor [b, C, H, W] for each map."""
    parts = masks.split(mask_bytes([c * h * w for c, h, w in shapes]), dim=1)
    ones = [drop_half(torch.ones(len(masks), *shape), part) for part, shape in zip(parts, shapes, strict=True)]
    assert all(set(map_.unique().tolist()) == {0.0, 2.0} for map_ in ones)
    return [map_ > 0 for map_ in ones]


def test_losses_and_all_gradients_equal_those_of_torchs_layers(both):
    state, generator, blocks, heads = both
    real, z = torch.rand(BATCH, 3, 128, 128, dtype=torch.float64) * 2 - 1, torch.randn(BATCH, 5, dtype=torch.float64)
    y, y_fake = torch.tensor([0, 2, 1, 1]), torch.tensor([2, 2, 0, 1])
    shapes = [(1, 64, 64), (2, 62, 62), (4, 31, 31), (8, 29, 29), (16, 15, 15), (32, 13, 13)]
    assert state.discriminator.dropped == [c * h * w for c, h, w in shapes]
    drops = [layer for layer in blocks if isinstance(layer, Drop)]

    def plain(images, masks):
        for drop, mask in zip(drops, as_booleans(masks, shapes), strict=True):
            drop.mask = mask
        features = blocks(images)
        return heads[0](features)[:, 0], heads[1](features)

    one_hot = nn.functional.one_hot(y_fake, 3).double()
    ours, theirs = state.generator(z, y_fake, GROUPS), generator(torch.cat([z, one_hot], 1))
    torch.testing.assert_close(ours, theirs, **BOUND)

    entropy, classes = nn.BCEWithLogitsLoss(reduction="sum"), nn.CrossEntropyLoss(reduction="sum")
    ones = torch.ones(BATCH, dtype=torch.float64)
    of_real, of_fake = (
        draw_masks(1, purpose, range(BATCH), state.discriminator.dropped)
        for purpose in (Purpose.DROP_REAL, Purpose.DROP_D)
    )
    outputs = state.discriminator(
        torch.cat([real, ours.detach()]), torch.cat([y, y_fake]), GROUPS.twice(), torch.cat([of_real, of_fake])
    ).split(BATCH)
    loss = Loss("bce", 1.0).discriminator(*outputs)
    expected = 0
    for images, labels, masks, target in ((real, y, of_real, ones), (theirs.detach(), y_fake, of_fake, 0 * ones)):
        logits, scores = plain(images, masks)
        expected += entropy(logits, target) + classes(scores, labels)
    torch.testing.assert_close(loss, expected, **BOUND)
    loss.backward()
    expected.backward()
    same_gradients(state.discriminator.blocks, blocks)

    masks = draw_masks(1, Purpose.DROP_G, range(BATCH), state.discriminator.dropped)
    loss = Loss("bce", 1.0).generator(state.discriminator(ours, y_fake, GROUPS, masks))
    logits, scores = plain(theirs, masks)
    expected = entropy(logits, ones) + classes(scores, y_fake)
    torch.testing.assert_close(loss, expected, **BOUND)
    loss.backward()
    expected.backward()
    layers = nn.ModuleList([state.generator.blocks, state.generator.norm, state.generator.conv])
    same_gradients(layers, generator[1:])
    first = generator[0].weight.grad
    torch.testing.assert_close(state.generator.embedding.weight.grad, first[:, 5:].t(), **BOUND)


def test_half_of_the_values_are_dropped_and_no_two_images_share_a_mask():
    values = [40, 7]
    masks = draw_masks(1, Purpose.DROP_D, range(1000), values)
    assert masks.shape == (1000, 5 + 1)
    kept = drop_half(torch.ones(1000, 5, 4, 2), masks[:, :5])
    assert kept.mean(0).sub(1).abs().max() < 0.16  # five standard deviations of a mean of 1000 values 0 or 2
    assert len(masks[:, :5].unique(dim=0)) == 1000
    assert torch.equal(masks[3:9:2], draw_masks(1, Purpose.DROP_D, range(3, 9, 2), values))
    others = [draw_masks(2, Purpose.DROP_D, range(1000), values), draw_masks(1, Purpose.DROP_G, range(1000), values)]
    assert not any(torch.equal(masks, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_dropout_keeps_is_doubled_exactly(dtype):
    x = torch.randn(2, 3, 5, 5).to(dtype).requires_grad_()
    masks = draw_masks(1, Purpose.DROP_D, range(2), [75])
    y = drop_half(x, masks)
    assert y.dtype == dtype
    assert torch.equal(y[y != 0], 2 * x[y != 0])
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y != 0, 2.0, 0.0).to(dtype))


def test_training_drops_and_an_evaluation_does_not():
    state = TrainState(CONFIG, OPTIM, seed=1)
    images, y = torch.rand(2, 3, 128, 128), torch.tensor([0, 1])
    assert torch.equal(state.discriminator(images, y), state.discriminator(images, y))
    received = []
    state.discriminator.register_forward_pre_hook(lambda module, given: received.append(given[3]))
    run(state, 1)
    of_d, of_g = received
    assert (len(of_d), len(of_g)) == (16, 8)
    assert len(torch.cat([of_d, of_g]).unique(dim=0)) == 24
    for network in (state.generator, state.discriminator):
        assert all(norm.running_mean.abs().max() > 0 for norm in batch_norm.layers(network))


def test_another_resolution_and_attention_are_refused():
    for differs in ({"resolution": 64}, {"resolution": 128, "attention": (64,)}):
        with pytest.raises(ValueError, match="architecture acgan has 128 px and no attention"):
            ModelConfig(architecture="acgan", **differs)
