"""The bootstrap interval of a mean: its exact cases, and what holds for all values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.study.bootstrap import mean_interval

NUMBERS = st.floats(-1e6, 1e6)
SAMPLES = st.lists(NUMBERS, min_size=2, max_size=12)
thorough = settings(max_examples=50)


@pytest.mark.parametrize("values", [[], [18.65]])
def test_fewer_than_two_values_have_no_interval(values: list[float]) -> None:
    assert mean_interval(values, 0.95) is None


@thorough
@given(NUMBERS, st.integers(2, 12))
def test_equal_values_have_an_interval_without_length(value: float, count: int) -> None:
    interval = mean_interval([value] * count, 0.95)
    assert interval is not None
    assert (interval.low, interval.high) == (value, value)


@pytest.mark.parametrize("values", [[1.0, 3.0], [1.0, 2.0, 4.0]])
def test_the_interval_of_two_or_three_values_reaches_from_the_least_to_the_greatest(values: list[float]) -> None:
    """The mean of all resamples is the least value with probability 1/4 or 1/27, above the tail of 1/40."""
    interval = mean_interval(values, 0.95)
    assert interval is not None
    assert (interval.low, interval.high) == (min(values), max(values))


@thorough
@given(SAMPLES, st.randoms(use_true_random=False))
def test_the_order_of_the_values_does_not_matter(values: list[float], random) -> None:
    shuffled = random.sample(values, len(values))
    assert mean_interval(shuffled, 0.95) == mean_interval(values, 0.95)


@thorough
@given(SAMPLES)
def test_the_interval_lies_between_the_least_and_the_greatest_value(values: list[float]) -> None:
    interval = mean_interval(values, 0.95)
    assert interval is not None
    assert min(values) <= interval.low <= interval.high <= max(values)


@thorough
@given(SAMPLES)
def test_a_higher_confidence_never_gives_a_shorter_interval(values: list[float]) -> None:
    narrow, wide = mean_interval(values, 0.5), mean_interval(values, 0.99)
    assert narrow is not None
    assert wide is not None
    assert wide.low <= narrow.low <= narrow.high <= wide.high


@thorough
@given(SAMPLES, NUMBERS, st.floats(0.01, 100))
def test_the_interval_moves_and_scales_with_the_values(values: list[float], by: float, scale: float) -> None:
    interval, moved = mean_interval(values, 0.9), mean_interval([scale * value + by for value in values], 0.9)
    assert interval is not None
    assert moved is not None
    expected = [scale * interval.low + by, scale * interval.high + by]
    assert [moved.low, moved.high] == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_it_holds_the_true_mean_about_as_often_as_its_confidence_says() -> None:
    """For normal values of 20 seeds, the percentile interval of 95 % holds the mean in about 92 of 100 samples."""
    samples = np.random.default_rng(1).normal(5.0, 2.0, size=(200, 20))
    intervals = [mean_interval(sample, 0.95) for sample in samples.tolist()]
    assert 0.88 <= np.mean([interval is not None and interval.holds(5.0) for interval in intervals]) <= 0.98
