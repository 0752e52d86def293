"""The networks are SAGAN's: sizes, parameter counts and costs as counted for the published systems.

At 128 px those of the official code; elsewhere with the widths of StudioGAN, mmgeneration and BigGAN-PyTorch.
"""

import pytest
import torch

from sagan.config import ModelConfig
from sagan.cost import forward_macs, parameters, step_flop_per_image
from sagan.discriminator import Discriminator
from sagan.generator import Generator
from sagan.spectral_norm import layers

COUNTS = [
    # resolution, classes, attention, generator, discriminator
    (128, 1000, (), 41_996_931, 39_443_137),
    (128, 1000, (8,), 43_307_652, 39_770_818),
    (128, 1000, (16,), 42_324_612, 39_525_058),
    (128, 1000, (32,), 42_078_852, 39_463_618),
    (128, 1000, (64,), 42_017_412, 39_448_258),
    (128, 0, (32,), 32_232_708, 38_439_618),
    (32, 10, (), 4_304_387, 1_055_105),
    (32, 10, (16,), 4_386_308, 1_075_586),
    (32, 0, (16,), 4_358_660, 1_074_306),
    (64, 200, (32,), 13_387_396, 19_752_642),
    (64, 1000, (32,), 17_995_396, 20_571_842),
    (64, 0, (32,), 12_241_156, 19_547_842),
    (256, 1000, (32,), 49_354_884, 44_507_330),
    (256, 1000, (64,), 49_109_124, 44_445_890),
    (256, 0, (32,), 37_462_788, 43_483_330),
]

OTHERS = [
    # what differs from the defaults at 128 px with 1 000 classes, generator, discriminator
    ({"attention": (), "thin_d": True}, 41_996_931, 30_041_857),  # SNGAN-projection
    ({"resolution": 64, "multipliers_g": (16, 16, 8, 4, 2)}, 41_577_732, 20_571_842),  # BigGAN-PyTorch
    ({"classes": 10, "channels_g": 4, "channels_d": 4}, 256_332, 151_438),
    ({"resolution": 32, "classes": 10, "channels_g": 4, "channels_d": 4}, 50_468, 4_586),
    ({"resolution": 32, "classes": 10, "channels_g": 8, "channels_d": 8}, 130_756, 17_522),
    ({"resolution": 32, "classes": 10, "channels_g": 16, "channels_d": 16}, 380_804, 68_450),
]

COSTS = [
    # the same; GMAC of a forward pass of generator and discriminator, GFLOP of a step, to the digits that are known
    ({"attention": ()}, "9.090", "4.693", "147.8"),
    ({"attention": (8,)}, "9.175", "4.714", "148.8"),
    ({"attention": (16,)}, "9.179", "4.717", "148.9"),
    ({"attention": (32,)}, "9.216", "4.735", "149.5"),
    ({"attention": (64,)}, "9.510", "4.882", "154.2"),
    ({"resolution": 32, "classes": 10}, "1.705", "0.279", "18.1"),
    ({"resolution": 64}, "1.997", "1.114", "33.8"),
    ({"resolution": 64, "multipliers_g": (16, 16, 8, 4, 2)}, "7.256", "1.114", "75.9"),
    ({"resolution": 256}, "32.21", "16.45", "521"),
    ({"resolution": 256, "attention": (64,)}, "32.80", "16.74", "530"),
]


def imagenet(**differs):
    return ModelConfig(**{"resolution": 128, "classes": 1000} | differs)


@pytest.mark.parametrize(("resolution", "classes", "attention", "generator", "discriminator"), COUNTS)
def test_parameter_counts_are_the_published_ones(resolution, classes, attention, generator, discriminator):
    config = ModelConfig(resolution=resolution, classes=classes, attention=attention)
    assert parameters(config) == (generator, discriminator)


@pytest.mark.parametrize(("differs", "generator", "discriminator"), OTHERS)
def test_parameter_counts_of_other_widths_are_the_counted_ones(differs, generator, discriminator):
    assert parameters(imagenet(**differs)) == (generator, discriminator)


@pytest.mark.parametrize(("form", "per_square"), [("released", 1.25), ("icml", 0.5), ("first", 1.25)])
def test_attention_has_the_parameters_of_its_form(form, per_square):
    """C/8 + C/8 + C/2 + C/2, four times C/8, or C/8 + C/8 + C rows of C weights, and γ."""
    with_, without = parameters(imagenet(attention_form=form)), parameters(imagenet(attention=()))
    assert [a - b for a, b in zip(with_, without, strict=True)] == [per_square * c**2 + 1 for c in (256, 128)]


@pytest.mark.parametrize(("differs", "generator", "discriminator", "step"), COSTS)
def test_costs_are_the_counted_ones(differs, generator, discriminator, step):
    config = imagenet(**differs)
    counted = (*forward_macs(config), step_flop_per_image(config))
    for count, known in zip(counted, (generator, discriminator, step), strict=True):
        assert f"{count / 1e9:.{len(known.partition('.')[2])}f}" == known


@pytest.mark.parametrize(("resolution", "classes"), [(32, 10), (64, 10), (128, 10), (256, 3), (32, 0), (64, 0)])
def test_one_class_of_network_serves_every_resolution(resolution, classes):
    config = ModelConfig(resolution=resolution, classes=classes, channels_g=4, channels_d=8, z_dim=8)
    z, y = torch.randn(2, 8), torch.tensor([0, 1]) if classes else None
    images = Generator(config).eval()(z, y)
    assert images.shape == (2, 3, resolution, resolution)
    assert images.abs().max() <= 1
    assert Discriminator(config)(images, y).shape == (2,)


def test_spectral_norm_is_on_21_and_23_layers_and_not_on_class_tables():
    with torch.device("meta"):
        config = ModelConfig(resolution=128, classes=1000, attention=(32,))
        generator, discriminator = Generator(config), Discriminator(config)
    assert (len(list(layers(generator))), len(list(layers(discriminator)))) == (21, 23)
    assert sum(len(layer.u) for _, layer in layers(generator)) == 22_787
    assert sum(len(layer.v) for _, layer in layers(generator)) == 48_896
    assert not any("norm" in name for name, _ in layers(generator))
    assert "embedding" in dict(layers(discriminator))


def test_the_projection_separates_classes():
    """The logit moves with the label by ⟨features, embedding⟩, whose weight is normalised."""
    torch.manual_seed(0)
    config = ModelConfig(resolution=32, classes=4, channels_d=8, attention=())
    discriminator = Discriminator(config).double()
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    features = torch.relu(discriminator.blocks(x)).sum((2, 3))
    unconditional = discriminator.linear(features).squeeze(1)
    y = torch.tensor([2, 0, 3])
    by_hand = unconditional + (features * discriminator.embedding.normalised_weight[y]).sum(1)
    torch.testing.assert_close(discriminator(x, y), by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resolution": 100}, "model.resolution is 100"),
        ({"resolution": 64, "attention": (128,)}, "model.attention"),
        ({"channels_g": 0}, "model.channels_g is 0"),
        ({"resolution": 32, "multipliers_g": (1, 2)}, "model.multipliers_g"),
    ],
)
def test_impossible_models_are_refused_with_key_and_value(values, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)


def test_a_collection_completes_and_contradicts():
    completed = ModelConfig().for_collection(64, 200)
    assert (completed.resolution, completed.classes, completed.attention) == (64, 200, (32,))
    assert ModelConfig(classes=0).for_collection(64, 200).classes == 0
    with pytest.raises(ValueError, match="10, but the collection has 200"):
        ModelConfig(classes=10).for_collection(64, 200)
