"""Bootstrap intervals of means over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.runs.json_records import Interval

RESAMPLES = 10_000


def mean_interval(values: Sequence[float], confidence: float) -> Interval | None:
    """Return the percentile bootstrap interval of the mean (Efron & Tibshirani 1993, section 13.3).

    The values of a row are one score per seed. For a paired interval, they are the differences between the scores of
    two rows with the same seed. The interval does not depend on the order of the values, and the same values always
    give the same interval. Of two or three values, the interval of 95 % reaches from the least to the greatest. It is
    too narrow then, because so few values do not show their spread.

    Args:
        values: Finite numbers.
        confidence: Confidence of the interval, in (0, 1).

    Returns None for fewer than two values. Equal values give an interval of length 0.
    """
    if len(values) < 2:
        return None
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    low, high = ordered[0], ordered[-1]
    chosen = np.random.default_rng(0).integers(len(ordered), size=(RESAMPLES, len(ordered)))
    means = (ordered / len(ordered))[chosen].sum(axis=1)  # divided first, since a sum of large values overflows
    tail = (1 - confidence) / 2
    ends = np.clip(np.quantile(means, [tail, 1 - tail]), low, high)  # rounding may lead out of the values
    return Interval(low=float(ends[0]), high=float(ends[1]))
