"""Parameters and costs are those of the published systems.

At 128 px those of the official code; elsewhere with the widths of StudioGAN, mmgeneration and BigGAN-PyTorch.
"""

import pytest

from sagan.config import ModelConfig
from sagan.cost import forward_macs, parameters, step_flop_per_image

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

DCGAN = {"architecture": "dcgan", "num_classes": 0, "z_dim": 100}
ACGAN = {"architecture": "acgan", "num_classes": 10, "z_dim": 100, "condition_d": "classifier", "channels_d": 16}

OTHERS = [
    # what differs from the defaults at 128 px with 1 000 classes, generator, discriminator
    ({"attention": (), "thin_d": True}, 41_996_931, 30_041_857),  # SNGAN-projection
    ({"resolution": 64, "multipliers_g": (16, 16, 8, 4, 2)}, 41_577_732, 20_571_842),  # BigGAN-PyTorch
    # DCGAN, the layers of compare_gan: 5×5 convolutions with biases, batch norm, a linear layer on the flattened map
    ({"resolution": 64} | DCGAN, 5_135_363, 4_316_545),
    ({"resolution": 128} | DCGAN, 7_617_539, 4_341_121),
    # AC-GAN as in 2017, the layers of clvrai/ACGAN-PyTorch for ten classes
    (ACGAN, 11_465_728, 2_525_563),
    # AC-GAN: 1 000 biases more than projection
    ({"attention": (), "condition_d": "classifier"}, 41_996_931, 39_443_137 + 1_000),
    ({"num_classes": 10, "channels_g": 4, "channels_d": 4}, 256_332, 151_438),
    ({"resolution": 32, "num_classes": 10, "channels_g": 4, "channels_d": 4}, 50_468, 4_586),
    ({"resolution": 32, "num_classes": 10, "channels_g": 8, "channels_d": 8}, 130_756, 17_522),
    ({"resolution": 32, "num_classes": 10, "channels_g": 16, "channels_d": 16}, 380_804, 68_450),
]

COSTS = [
    # the same; GMAC of a forward pass of generator and discriminator, GFLOP of a step, to the digits that are known
    ({"attention": ()}, "9.090", "4.693", "147.8"),
    ({"attention": (8,)}, "9.175", "4.714", "148.8"),
    ({"attention": (16,)}, "9.179", "4.717", "148.9"),
    ({"attention": (32,)}, "9.216", "4.735", "149.5"),
    ({"attention": (64,)}, "9.510", "4.882", "154.2"),
    ({"attention": (8,), "attention_form": "residual_1x1"}, "9.174", "4.714", "148.8"),
    ({"attention": (32,), "attention_form": "residual_1x1"}, "9.174", "4.714", "148.8"),
    ({"attention": (32,), "attention_form": "residual_3x3"}, "9.175", "4.714", "148.8"),
    ({"attention": (), "condition_d": "classifier"}, "9.0901", "4.6942", "147.83"),  # 1.02 MMAC of the classifier
    # 100 · 16 · 512 + 25 (8² · 512 · 256 + 16² · 256 · 128 + 32² · 128 · 64 + 64² · 64 · 3) / 4, and the same back
    ({"resolution": 64} | DCGAN, "0.16302", "0.16221", "3.900"),
    ({"resolution": 128} | DCGAN, "0.65208", "0.64884", "15.598"),
    (ACGAN, "0.580636", "0.365869", "10.499"),  # as torch counts the peer's networks, without the label's row in G
    ({"resolution": 32, "num_classes": 10}, "1.705", "0.279", "18.1"),
    ({"resolution": 64}, "1.997", "1.114", "33.8"),
    ({"resolution": 64, "multipliers_g": (16, 16, 8, 4, 2)}, "7.256", "1.114", "75.9"),
    ({"resolution": 256}, "32.21", "16.45", "521"),
    ({"resolution": 256, "attention": (64,)}, "32.80", "16.74", "530"),
]


def imagenet(**differs):
    return ModelConfig(**{"resolution": 128, "num_classes": 1000} | differs)


@pytest.mark.parametrize(("resolution", "classes", "attention", "generator", "discriminator"), COUNTS)
def test_parameter_counts_are_the_published_ones(resolution, classes, attention, generator, discriminator):
    config = ModelConfig(resolution=resolution, num_classes=classes, attention=attention)
    assert parameters(config) == (generator, discriminator)


@pytest.mark.parametrize(("differs", "generator", "discriminator"), OTHERS)
def test_parameter_counts_of_other_widths_are_the_counted_ones(differs, generator, discriminator):
    assert parameters(imagenet(**differs)) == (generator, discriminator)


@pytest.mark.parametrize(("form", "per_square"), [("released", 1.25), ("icml", 0.5), ("first", 1.25)])
def test_attention_has_the_parameters_of_its_form(form, per_square):
    """C/8 + C/8 + C/2 + C/2, four times C/8, or C/8 + C/8 + C rows of C weights, and γ."""
    with_, without = parameters(imagenet(attention_form=form)), parameters(imagenet(attention=()))
    assert [a - b for a, b in zip(with_, without, strict=True)] == [per_square * c**2 + 1 for c in (256, 128)]


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_the_1x1_control_has_the_parameters_of_attention(size):
    """To the last one: 2 · 5/8 C² weights and γ."""
    attention, control = (imagenet(attention=(size,), attention_form=form) for form in ("released", "residual_1x1"))
    assert parameters(control) == parameters(attention)


CONTROLS = [
    # size of the map; parameters of the 3×3 control in generator and discriminator, relative to those of attention
    (8, 1_308_672, 331_776, 0.0125),
    (16, 331_776, 82_944, 0.0125),
    (32, 82_944, 20_736, 0.0125),
    (64, 20_736, 4_608, 0.1),  # 64 channels in the discriminator: 4.4 inner channels are rounded to 4
]


@pytest.mark.parametrize(("size", "generator", "discriminator", "bound"), CONTROLS)
def test_the_3x3_control_has_nearly_the_parameters_of_attention(size, generator, discriminator, bound):
    without = parameters(imagenet(attention=()))
    attention, control = (
        [
            with_ - n
            for with_, n in zip(parameters(imagenet(attention=(size,), attention_form=form)), without, strict=True)
        ]
        for form in ("released", "residual_3x3")
    )
    assert control == [generator + 1, discriminator + 1]  # and γ
    assert all(abs(c / a - 1) < bound + 1e-4 for a, c in zip(attention, control, strict=True))


@pytest.mark.parametrize(("differs", "generator", "discriminator", "step"), COSTS)
def test_costs_are_the_counted_ones(differs, generator, discriminator, step):
    config = imagenet(**differs)
    counted = (*forward_macs(config), step_flop_per_image(config))
    for count, known in zip(counted, (generator, discriminator, step), strict=True):
        assert f"{count / 1e9:.{len(known.partition('.')[2])}f}" == known
