import torch

from sagan import OptimConfig, TrainState
from tests.unit.sagan.training import BATCH, CONFIG, run


def test_the_average_is_a_copy_until_it_starts():
    state = TrainState(CONFIG, OptimConfig(ema_decay=0.9, ema_start_kimg=2 * BATCH / 1000), seed=1)
    weights = dict(state.generator.named_parameters())
    run(state, 1)
    assert all(torch.equal(average, weights[name]) for name, average in state.ema.items())
    run(state, 1)
    name = "conv.weight"
    assert not torch.equal(state.ema[name], weights[name])
