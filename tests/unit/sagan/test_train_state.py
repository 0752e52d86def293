"""A state is everything a step reads and changes: saved and resumed it goes on bit for bit."""

from dataclasses import replace

import pytest

from sagan import OptimConfig, TrainState
from sagan.train_state import FORMAT
from tests.unit.sagan.training import BATCH, CONFIG, run, same


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


@pytest.mark.parametrize(
    ("model", "optim"),
    [
        pytest.param({"attention_form": "icml"}, {}, id="attention of the paper"),
        pytest.param({"attention_form": "first"}, {}, id="attention of the first version"),
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
