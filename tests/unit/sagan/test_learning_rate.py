"""Both learning rates fall between the two positions of `lr_decay_kimg`."""

from sagan import OptimConfig
from sagan.learning_rate import learning_rate_factor


def test_rates_fall_linearly_to_zero():
    optim = OptimConfig(lr_decay_kimg=(1, 3))
    assert [learning_rate_factor(optim, images) for images in (0, 1000, 2000, 3000, 4000)] == [1, 1, 0.5, 0, 0]


def test_rates_are_constant_without_a_decay():
    assert learning_rate_factor(OptimConfig(), 10**9) == 1
