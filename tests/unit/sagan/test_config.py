import pytest

from sagan.config import ModelConfig


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
    ],
)
def test_impossible_models_are_refused_with_key_and_value(values, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)


def test_a_collection_completes_and_contradicts():
    completed = ModelConfig().for_collection(64, 200)
    assert (completed.resolution, completed.num_classes, completed.attention) == (64, 200, (32,))
    assert ModelConfig(num_classes=0).for_collection(64, 200).num_classes == 0
    with pytest.raises(ValueError, match="10, but the collection has 200"):
        ModelConfig(num_classes=10).for_collection(64, 200)
