"""A state is everything a step reads and changes: saved and resumed it goes on bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sagan import OptimConfig, TrainState
from sagan.train_state import FACTS, FORMAT, TENSORS
from tests.unit.sagan.training import ACGAN, BATCH, CONFIG, run, same


@pytest.mark.parametrize("n_dis", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, n_dis):
    optim = OptimConfig(n_dis=n_dis, ema_decay=0.9, ema_start_kimg=0.02)
    whole = TrainState(CONFIG, optim, seed=1)
    losses = run(whole, 5)
    first = TrainState(CONFIG, optim, seed=1)
    run(first, 2)
    first.save(tmp_path)
    second = TrainState.load(tmp_path)
    assert second.images == 2 * n_dis * BATCH
    assert same(first, second)
    assert run(second, 3) == losses[2:]
    assert same(whole, second)


def test_a_copy_is_written_as_the_state_was_when_it_was_taken(tmp_path):
    state = TrainState(CONFIG, OptimConfig(), seed=1)
    run(state, 1)
    folders = [tmp_path / name for name in ("state", "copy")]
    for folder in folders:
        folder.mkdir()
    state.save(folders[0])
    copy = state.copied()
    run(state, 1)
    copy.save(folders[1])
    assert [(folders[0] / name).read_bytes() for name in (TENSORS, FACTS)] == [
        (folders[1] / name).read_bytes() for name in (TENSORS, FACTS)
    ]


@pytest.mark.parametrize(
    ("model", "optim"),
    [
        pytest.param({"attention_form": "icml"}, {}, id="attention of the paper"),
        pytest.param({"attention_form": "first"}, {}, id="attention of the first version"),
        pytest.param({"attention_form": "residual_1x1"}, {}, id="residual control"),
        pytest.param({"architecture": "dcgan", "attention": (), "init_std": 0.02}, {"loss": "bce"}, id="DCGAN"),
        pytest.param({"condition_d": "classifier"}, {"loss": "bce"}, id="AC-GAN"),
        pytest.param(ACGAN, {"loss": "bce"}, id="AC-GAN of 2017"),
        pytest.param({"spectral_norm_g": False}, {"lr_d": 1e-4}, id="norm on D only, equal rates"),
        pytest.param({"spectral_norm_gradient": "through", "spectral_norm_start": "cold"}, {}, id="official norm"),
        pytest.param({"thin_d": True, "attention": ()}, {"lr_decay_kimg": (0, 1), "n_dis": 2}, id="SNGAN-projection"),
        pytest.param({"num_classes": 0, "slope_g": 0.02, "slope_d": 0.02}, {}, id="leaky, unconditional"),
    ],
)
def test_every_system_resumes_bit_for_bit(model, optim, tmp_path):
    config, rates = replace(CONFIG, **model), OptimConfig(**optim)
    whole, first = TrainState(config, rates, seed=1), TrainState(config, rates, seed=1)
    losses = run(whole, 3)
    run(first, 1)
    first.save(tmp_path)
    second = TrainState.load(tmp_path)
    assert run(second, 2) == losses[1:]
    assert same(whole, second)


def test_another_format_is_refused_by_name(tmp_path):
    TrainState(CONFIG, OptimConfig(), seed=0).save(tmp_path)
    facts = tmp_path / "state.json"
    facts.write_text(facts.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    with pytest.raises(ValueError, match="format 99"):
        TrainState.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda facts, tensors: facts.update(seed=-1), "seed must be"),
        (lambda facts, tensors: facts.update(images="1"), "images must be"),
        (lambda facts, tensors: facts.update(model=[1]), "state.json"),
        (lambda facts, tensors: facts["model"].update(z_dim="8"), "state.json"),
        (lambda facts, tensors: facts["model"].update(num_classes=100_000, channels_g=1024), "is not as state.json"),
        (lambda facts, tensors: facts["optim"].update(lr_g=None), "state.json"),
        (lambda facts, tensors: facts.pop("optim"), "no entry 'optim'"),
        (lambda facts, tensors: tensors.pop("ema.conv.weight"), "'ema.conv.weight' is not as"),
        (lambda facts, tensors: tensors.update({"ema.conv.weight": torch.zeros(1)}), "'ema.conv.weight' is not as"),
        (lambda facts, tensors: tensors.update({"ema.other": torch.zeros(1)}), "'ema.other' is not as"),
        (lambda facts, tensors: tensors.pop("adam_g.conv.weight.step"), "'adam_g.conv.weight.step' is not as"),
    ],
)
def test_a_state_of_somebody_else_is_checked_before_it_takes_memory(change, named, tmp_path):
    state = TrainState(CONFIG, OptimConfig(), seed=0)
    run(state, 1)
    state.save(tmp_path)
    facts, tensors = json.loads((tmp_path / "state.json").read_text()), load_file(tmp_path / "state.safetensors")
    change(facts, tensors)
    (tmp_path / "state.json").write_text(json.dumps(facts))
    save_file(tensors, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=named):
        TrainState.load(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"\xff" * 100])
def test_a_damaged_file_of_a_state_is_named(name, data, tmp_path):
    TrainState(CONFIG, OptimConfig(), seed=0).save(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        TrainState.load(tmp_path)
