import pytest
import torch

from sagan.config import RESOLUTIONS, ModelConfig
from sagan.discriminator import Discriminator
from sagan.generator import Generator


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resolution": 100}, "model.resolution is 100"),
        ({"resolution": 64, "attention": (128,)}, "model.attention"),
        ({"channels_g": 0}, "model.channels_g is 0"),
        ({"channels_g": 10**6}, "model.channels_g is 1000000"),
        ({"resolution": 64, "channels_d": 2000}, "model.channels_d is 2000, so the widest block has 32000 channels"),
        ({"z_dim": 10**9}, "model.z_dim is 1000000000"),
        ({"num_classes": 10**8}, "model.num_classes is 100000000"),
        ({"num_classes": -1}, "model.num_classes is -1"),
        ({"resolution": 32, "multipliers_g": (1, 2)}, "model.multipliers_g"),
        ({"resolution": 64, "channels_d": 2}, "model.channels_d 2 gives 2 channels at the size 32"),
        ({"resolution": 64, "channels_g": 6, "attention": (32,)}, "model.channels_g 6 gives 12 channels"),
        ({"resolution": 32, "channels_d": 4, "multipliers_d": (2, 1, 2, 2), "attention": (8,)}, "4 channels at"),
    ],
)
def test_impossible_models_are_refused_with_key_and_value(values, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("network", ["g", "d"])
def test_a_configuration_that_is_accepted_makes_its_networks(resolution, network):
    build = {"g": Generator, "d": Discriminator}[network]
    refused = []
    for channels in (1, 2, 4, 6, 8):
        for size in (8, 16, 32, 64, 128):
            values = {"resolution": resolution, "num_classes": 2, "channels_g": 8, "channels_d": 8, "z_dim": 2}
            values |= {f"channels_{network}": channels, "attention": (size,)}
            try:
                config = ModelConfig(**values)
            except ValueError as error:
                refused.append(str(error))
                continue
            with torch.device("meta"):
                build(config)
    assert 0 < len(refused) < 25
    assert all(message.startswith(("model.attention", f"model.channels_{network}")) for message in refused)


def test_a_collection_completes_and_contradicts():
    completed = ModelConfig().for_collection(64, 200)
    assert (completed.resolution, completed.num_classes, completed.attention) == (64, 200, (32,))
    assert ModelConfig(num_classes=0).for_collection(64, 200).num_classes == 0
    with pytest.raises(ValueError, match="10, but the collection has 200"):
        ModelConfig(num_classes=10).for_collection(64, 200)
