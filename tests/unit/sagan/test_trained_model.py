"""A finished model is saved, loaded and sampled repeatably, by its own copy of the code."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import sagan
from sagan import Model, OptimConfig, TrainState
from sagan.random import Purpose, draw_latents
from tests.unit.sagan.training import CONFIG, run


@pytest.fixture
def state():
    state = TrainState(CONFIG, OptimConfig(ema_decay=0.5), seed=1)
    run(state, 2)
    return state


def test_round_trip_and_repeatable_samples(state, tmp_path):
    model = Model.from_state(state, standing_images=256, class_names=["cat", "dog", "owl"])
    model.save(tmp_path)
    loaded = sagan.load(tmp_path)
    images = loaded.sample(["dog", 2], n=5, seed=3)
    assert images.shape == (5, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert torch.equal(images, model.sample(["dog", "owl"], n=5, seed=3))
    assert loaded.labels_for(["dog", 2], 5).tolist() == [1, 2, 1, 2, 1]
    assert not torch.equal(images, loaded.sample(["dog", 2], n=5, seed=4))


def test_saved_weights_need_no_spectral_norm(state, tmp_path):
    Model.from_state(state, standing_images=64).save(tmp_path)
    tensors = load_file(tmp_path / "generator.safetensors")
    assert not any(name.endswith((".u", ".v")) for name in tensors)
    assert torch.linalg.svdvals(tensors["blocks.0.conv2.weight"].flatten(1))[0] < 1.05


def test_standing_statistics_do_not_depend_on_how_samples_are_batched(state):
    model = Model.from_state(state, standing_images=200)
    z, y = draw_latents(0, Purpose.SAMPLE_Z, range(7), 8), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    one_by_one = torch.cat([model.generate(z[i : i + 1], y[i : i + 1]) for i in range(7)])
    # a pixel may round the other way where convolutions sum in another order
    assert (model.generate(z, y).int() - one_by_one.int()).abs().max() <= 1


def test_raw_and_averaged_weights_differ(state):
    raw = Model.from_state(state, weights="raw", standing_images=64).sample(n=3)
    assert not torch.equal(raw, Model.from_state(state, standing_images=64).sample(n=3))


def test_running_averages_are_the_named_alternative(state):
    """After two steps they are mostly their initial values, and a model with them another one."""
    model = Model.from_state(state, standing_images=None)
    for name, tensor in state.generator.state_dict().items():
        if "running" in name:
            assert torch.equal(model.generator.state_dict()[name], tensor)
    assert not torch.equal(model.sample(n=3), Model.from_state(state, standing_images=64).sample(n=3))


def test_unknown_classes_are_named(state):
    model = Model.from_state(state, standing_images=64, class_names=["cat", "dog", "owl"])
    with pytest.raises(ValueError, match="no class 'cow'; it has 3 classes: cat, dog, owl"):
        model.sample(["cow"])


def test_the_shipped_code_is_enough(state, tmp_path):
    """The folder's own copy of the package samples with torch and safetensors alone."""
    Model.from_state(state, standing_images=64).save(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'code')!r}); import sagan; "
        f"assert sagan.__file__.startswith({str(tmp_path)!r}); "
        f"print(tuple(sagan.load({str(tmp_path)!r}).sample(n=2).shape), "
        "sorted({'ray', 'mlflow', 'fsspec', 'pydantic', 'pipeline'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 3, 32, 32) []"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts["model"].update(channels_g=10**6), "model.channels_g is 1000000"),
        (lambda facts: facts["model"].update(channels_g=16), "does not hold the generator that config.json describes"),
        (lambda facts: facts["model"].update(channels_g="4"), "config.json: "),
        (lambda facts: facts["model"].update(channels_g=4.5), "config.json: "),
        (lambda facts: facts["model"].update(num_classes=None), "config.json: model.num_classes is not set"),
        (lambda facts: facts["model"].update(more=1), "config.json: .*more"),
        (lambda facts: facts.update(class_names=["cat", "cat", "cat"]), "must not have a name twice"),
        (lambda facts: facts.update(class_names=["cat"]), "1 names for 3 classes"),
        (lambda facts: facts.update(class_names="cat"), "must be a list of texts"),
        (lambda facts: facts.update(class_names=[1, 2, 3]), "must be a list of texts"),
        (lambda facts: facts.update(format=3), "format 3"),
        (lambda facts: facts.pop("weights"), "no entry 'weights'"),
        (lambda facts: facts.pop("model"), "no entry 'model'"),
    ],
)
def test_a_foreign_configuration_is_refused(state, tmp_path, change, message):
    Model.from_state(state, standing_images=64, class_names=["cat", "dog", "owl"]).save(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    change(facts)
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=message):
        sagan.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generator.safetensors"])
@pytest.mark.parametrize("data", [b"", b"[]", b"x", b"[" * 100_000])
def test_a_damaged_model_is_refused(state, tmp_path, name, data):
    Model.from_state(state, standing_images=64).save(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        sagan.load(tmp_path)
