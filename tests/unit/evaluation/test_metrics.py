from __future__ import annotations

import pytest
import torch

from pipeline.evaluation.fidelity import import_torch_fidelity
from pipeline.evaluation.metrics import (
    class_accuracy,
    higher_is_better,
    inception_score,
    kernel_distance,
    precision_recall,
)


def normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_the_inception_score_is_the_number_of_classes_at_best_and_one_at_worst() -> None:
    certain = 100 * torch.eye(10).repeat(100, 1)
    assert inception_score(certain, splits=1) == pytest.approx(10)
    assert inception_score(torch.zeros(1000, 10)) == pytest.approx(1)


def test_scores_are_torch_fidelitys() -> None:
    import_torch_fidelity()
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    logits = normal(200, 10, 0)
    assert inception_score(logits) == isc_features_to_metric(logits)["inception_score_mean"]
    a, b = normal(150, 8, 1), normal(200, 8, 2) + 0.3
    theirs = kid_features_to_metric(a, b, kid_subset_size=150, verbose=False)["kernel_inception_distance_mean"]
    assert kernel_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    prc = prc_features_to_metric(a, b, verbose=False)
    assert precision_recall(a, b) == (prc["precision"], prc["recall"])


def test_precision_and_recall_tell_truth_from_variety() -> None:
    real = normal(400, 4, 0)
    few_but_true = real[:10].repeat(40, 1)
    precision, recall = precision_recall(few_but_true, real)
    assert precision == 1
    assert recall < 0.1
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 100, real) == (0, 0)


def test_few_images_still_have_a_kernel_distance() -> None:
    assert abs(kernel_distance(normal(20, 4, 0), normal(30, 4, 1))) < kernel_distance(
        normal(20, 4, 0) + 3, normal(30, 4, 1)
    )


def test_class_accuracy_counts_the_largest_logit() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert class_accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75


def test_distances_are_better_when_lower() -> None:
    assert not any(map(higher_is_better, ("fid", "fid_inception_12345678", "fd_classifier", "kid", "auto")))
    assert all(map(higher_is_better, ("isc", "isc_classifier", "class_accuracy", "precision", "recall")))
