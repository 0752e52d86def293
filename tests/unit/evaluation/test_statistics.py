from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import DataSection
from pipeline.data.index import Collection
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.fidelity import import_torch_fidelity
from pipeline.evaluation.statistics import Moments, frechet_distance, reference, reference_features


def features(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + torch.arange(columns)


@given(cuts=st.lists(st.integers(1, 59), max_size=8), seed=st.integers(0, 5))
def test_moments_do_not_depend_on_how_rows_are_cut(cuts: list[int], seed: int) -> None:
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


def brightness(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two features that anybody can compute, and logits that always say class 1."""
    x = images.float().mean((1, 3))
    return x[:, ::8], torch.nn.functional.one_hot(torch.ones(len(x), dtype=torch.int64), 10).float()


def test_reference_moments_are_those_of_all_images_and_are_taken_once(digits: Collection, data: DataSection) -> None:
    calls = []

    def counted(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(images))
        return brightness(images)

    extractor = Extractor("brightness", "aa" * 32, counted)
    first = reference(digits, "heldout", extractor, data, batch=50)
    assert sum(calls) == digits.size("heldout") == first.moments.count
    again = reference(digits, "heldout", extractor, data, batch=7)
    assert sum(calls) == digits.size("heldout")
    torch.testing.assert_close(again.moments.scatter, first.moments.scatter, rtol=0, atol=0)
    ones = float((digits.labels[list(digits.ids("heldout"))] == 1).mean())
    assert again.accuracy == first.accuracy == pytest.approx(ones)


def test_another_extractor_split_or_resize_has_its_own_statistics(digits: Collection, data: DataSection) -> None:
    def twice(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, logits = brightness(images)
        return 2 * x, logits

    a = reference(digits, "heldout", Extractor("b", "bb" * 32, brightness), data, 64)
    other_file = reference(digits, "heldout", Extractor("b", "cc" * 32, twice), data, 64)
    other_resize = reference(digits, "heldout", Extractor("b", "bb" * 32, twice, resize="clean"), data, 64)
    other_split = reference(digits, "train", Extractor("b", "bb" * 32, brightness), data, 64)
    for other in (other_file, other_resize):
        torch.testing.assert_close(other.moments.mean, 2 * a.moments.mean)
    assert other_split.moments.count == digits.size("train")


def test_reference_features_are_spread_over_the_split(digits: Collection, data: DataSection) -> None:
    extractor = Extractor("b", "dd" * 32, brightness)
    everything = reference_features(digits, "heldout", extractor, data, batch=64, count=10_000)
    some = reference_features(digits, "heldout", extractor, data, batch=64, count=90)
    assert everything.shape == (360, 4)
    torch.testing.assert_close(some, everything[::4])
