from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.extractors.published_networks import import_torch_fidelity
from pipeline.evaluation.frechet_distance import Moments, frechet_distance


def features(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + torch.arange(columns)


@given(cuts=st.lists(st.integers(1, 59), max_size=8), seed=st.integers(0, 5))
def test_frechet_distance_do_not_depend_on_how_rows_are_cut(cuts: list[int], seed: int) -> None:
    x = features(60, 5, seed)
    edges = [0, *sorted(set(cuts)), 60]
    parts = [Moments.of(x[a:b]) for a, b in itertools.pairwise(edges)]
    for order in (parts, parts[::-1]):
        merged = functools.reduce(Moments.merge, order)
        assert merged.count == 60
        np.testing.assert_allclose(merged.mean, x.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(merged.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_a_covariance_needs_two_rows() -> None:
    with pytest.raises(ValueError, match="two images"):
        _ = Moments.of(features(1, 3)).covariance


def test_the_distance_of_gaussians_is_the_closed_form() -> None:
    mean, deviation = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    rotation = torch.linalg.qr(features(3, 3).double())[0]
    a = Moments(101, torch.zeros(3).double(), 100 * torch.eye(3).double())
    b = Moments(51, mean, 50 * rotation @ torch.diag(deviation**2) @ rotation.T)
    assert frechet_distance(a, b) == pytest.approx(float((mean**2).sum() + ((deviation - 1) ** 2).sum()), rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(500, 64), (40, 64), (9, 64)])
def test_the_distance_is_torch_fidelitys(rows: int, columns: int) -> None:
    """Fewer rows than columns too, where covariances are singular."""
    import_torch_fidelity()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = features(rows, columns).double(), features(2 * rows, columns, seed=1).double().relu()
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    ours, traces = frechet_distance(Moments.of(a), Moments.of(b)), float(a.T.cov().trace() + b.T.cov().trace())
    assert ours == pytest.approx(theirs["frechet_inception_distance"], abs=1e-6 * traces)
    assert frechet_distance(Moments.of(a), Moments.of(a)) == pytest.approx(0, abs=1e-6 * traces)
