from __future__ import annotations

import pytest
import torch

from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.data.index import Collection
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.extractors import Extractor


def evaluator(digits: Collection, data: DataSection, extractor: Extractor, batch: int = 64) -> Evaluator:
    return Evaluator(EvaluateSection(batch=batch), digits, data, extractor, None)


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
    first = evaluator(digits, data, extractor, batch=50).reference("heldout")
    assert sum(calls) == digits.size("heldout") == first.moments.count
    again = evaluator(digits, data, extractor, batch=7).reference("heldout")
    assert sum(calls) == digits.size("heldout")
    torch.testing.assert_close(again.moments.scatter, first.moments.scatter, rtol=0, atol=0)
    ones = float((digits.labels[list(digits.ids("heldout"))] == 1).mean())
    assert again.accuracy == first.accuracy == pytest.approx(ones)


def test_another_extractor_split_or_resize_has_its_own_statistics(digits: Collection, data: DataSection) -> None:
    def twice(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, logits = brightness(images)
        return 2 * x, logits

    a = evaluator(digits, data, Extractor("b", "bb" * 32, brightness)).reference("heldout")
    other_file = evaluator(digits, data, Extractor("b", "cc" * 32, twice)).reference("heldout")
    other_resize = evaluator(digits, data, Extractor("b", "bb" * 32, twice, resize="clean")).reference("heldout")
    other_split = evaluator(digits, data, Extractor("b", "bb" * 32, brightness)).reference("train")
    for other in (other_file, other_resize):
        torch.testing.assert_close(other.moments.mean, 2 * a.moments.mean)
    assert other_split.moments.count == digits.size("train")


def test_reference_features_are_spread_over_the_split(digits: Collection, data: DataSection) -> None:
    of_brightness = evaluator(digits, data, Extractor("b", "dd" * 32, brightness))
    everything = of_brightness.reference_features("heldout", 10_000)
    some = of_brightness.reference_features("heldout", 90)
    assert everything.shape == (360, 4)
    torch.testing.assert_close(some, everything[::4])


def test_rows_of_all_real_images_are_those_that_the_statistics_were_taken_of(
    digits: Collection, data: DataSection
) -> None:
    calls = []

    def counted(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(images))
        return brightness(images)

    section = EvaluateSection(precision_recall=True, samples=1000)
    of_brightness = Evaluator(section, digits, data, Extractor("b", "ee" * 32, counted), None)
    moments = of_brightness.reference("heldout").moments
    rows = of_brightness.reference_features("heldout", 1000)
    assert sum(calls) == digits.size("heldout") == len(rows)
    torch.testing.assert_close(rows.double().mean(0), moments.mean)
