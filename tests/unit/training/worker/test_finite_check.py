"""A value that is not finite is found one step later, and at the end."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.training.worker.finite_check import FiniteCheck, first_not_finite
from sagan import OptimConfig, TrainState
from tests.unit.sagan.training import CONFIG


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_it_is_found_at_the_next_step(bad: float) -> None:
    check = FiniteCheck()
    assert check.step(32, torch.tensor([1.0, 2.0])) is None
    assert check.step(64, torch.tensor([1.0, bad])) is None
    assert check.step(96, torch.tensor([1.0, 2.0])) == 64
    assert check.last() is None


def test_it_is_found_before_a_log() -> None:
    check = FiniteCheck()
    check.step(32, torch.tensor([math.nan]))
    assert check.last() == 32
    assert check.last() is None


def test_the_first_tensor_of_a_state_is_named() -> None:
    state = TrainState(CONFIG, OptimConfig(), seed=0)
    assert first_not_finite(state) is None
    name, tensor = next(iter(state.tensors()))
    with torch.no_grad():
        tensor.view(-1)[0] = math.nan
    assert first_not_finite(state) == name


def test_finite_values_whose_sum_is_infinite_are_finite() -> None:
    state = TrainState(CONFIG, OptimConfig(), seed=0)
    name, tensor = next(iter(state.tensors()))
    with torch.no_grad():
        tensor.fill_(3e38)
    assert tensor.sum().isinf()
    assert first_not_finite(state) is None
    with torch.no_grad():
        tensor.view(-1)[-1] = -math.inf
    assert first_not_finite(state) == name
