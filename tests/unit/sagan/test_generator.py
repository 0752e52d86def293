import pytest
import torch

from sagan.config import ModelConfig
from sagan.generator import Generator
from sagan.spectral_norm import layers


@pytest.mark.parametrize(("resolution", "classes"), [(32, 10), (64, 10), (128, 10), (256, 3), (32, 0), (64, 0)])
def test_one_class_serves_every_resolution(resolution, classes):
    config = ModelConfig(resolution=resolution, num_classes=classes, channels_g=4, z_dim=8)
    z, y = torch.randn(2, 8), torch.tensor([0, 1]) if classes else None
    images = Generator(config).eval()(z, y)
    assert images.shape == (2, 3, resolution, resolution)
    assert images.abs().max() <= 1


def test_spectral_norm_is_on_21_layers_and_not_on_class_tables():
    with torch.device("meta"):
        generator = Generator(ModelConfig(resolution=128, num_classes=1000, attention=(32,)))
    assert len(list(layers(generator))) == 21
    assert sum(len(layer.u) for _, layer in layers(generator)) == 22_787
    assert sum(len(layer.v) for _, layer in layers(generator)) == 48_896
    assert not any("norm" in name for name, _ in layers(generator))
