from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.evaluation.extractors.published_networks import FILES, import_torch_fidelity
from pipeline.evaluation.frechet_distance import Moments
from pipeline.evaluation.metrics import (
    METRICS,
    Images,
    Metric,
    class_accuracy,
    density_coverage,
    inception_score,
    kernel_distance,
    metric_named,
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


def density_coverage_in_numpy(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    """Naeem et al. 2020, equations 3 to 5, word by word."""
    between_real = np.linalg.norm(real[:, None] - real[None], axis=2)
    np.fill_diagonal(between_real, np.inf)  # an image is no neighbour of its own
    radii = np.sort(between_real, axis=1)[:, k - 1]
    contained = np.linalg.norm(real[:, None] - generated[None], axis=2) < radii[:, None]  # [real, generated]
    return float(contained.sum(0).mean() / k), float(contained.any(1).mean())


@pytest.mark.parametrize(("generated_rows", "real_rows", "columns"), [(150, 200, 8), (1100, 1200, 4)])
def test_density_and_coverage_are_the_papers_formulas(generated_rows: int, real_rows: int, columns: int) -> None:
    """The second size is more rows than distances are computed for at a time."""
    generated, real = normal(generated_rows, columns, 1) + 1, normal(real_rows, columns, 2)
    expected = density_coverage_in_numpy(generated.double().numpy(), real.double().numpy(), k=5)
    assert all(0.1 < value < 0.95 for value in expected)
    # Both count the same balls, since no random distance comes near a radius; only the divisions round differently.
    assert density_coverage(generated, real) == pytest.approx(expected, rel=0, abs=1e-12)


def test_density_and_coverage_tell_truth_from_variety() -> None:
    real = normal(400, 4, 0)
    # Each ball holds its centre and four neighbours; rounding decides on the fifth, whose distance is the radius.
    density, coverage = density_coverage(real, real)
    assert 1 <= density <= 6 / 5
    assert coverage == 1
    assert density_coverage(real + 100, real) == (0, 0)
    density, coverage = density_coverage(real[:10].repeat(40, 1), real)
    assert density > 0.5
    assert coverage < 0.2


# --- names -----------------------------------------------------------------------------------------------------------

PUBLISHED_INCEPTION, PUBLISHED_VGG16 = (str(FILES[name].digest) for name in ("inception", "vgg16"))


def extractor(name: str, digest: str = "1234abcd", resize: str = "none") -> Extractor:
    return Extractor(name, digest.ljust(64, "0"), lambda images: (images, images), resize)


def names_under(extractor: Extractor, *metrics: str) -> list[str]:
    by_name = {metric.name: metric for metric in METRICS}
    return [by_name[name].name_under(extractor) for name in metrics]


@pytest.mark.parametrize(
    ("name", "digest", "resize", "names"),
    [
        ("inception", PUBLISHED_INCEPTION, "tf1-bilinear-299", ["fid", "isc", "kid"]),
        ("inception", PUBLISHED_INCEPTION, "clean-bicubic-299", ["fid_clean", "isc_clean", "kid_clean"]),
        ("inception", "1234abcd", "tf1-bilinear-299", [f"{m}_inception_1234abcd" for m in ("fid", "isc", "kid")]),
        (
            "inception",
            "1234abcd",
            "clean-bicubic-299",
            [f"{m}_inception_1234abcd_clean" for m in ("fid", "isc", "kid")],
        ),
        ("vgg16", PUBLISHED_VGG16, "tf1-bilinear-224", [f"{m}_vgg16" for m in ("fd", "isc", "kid")]),
        ("vgg16", "6726825d", "tf1-bilinear-224", [f"{m}_vgg16_6726825d" for m in ("fd", "isc", "kid")]),
        (
            "clip-vit-b-32",
            "40d36571",
            "tf1-bilinear-224",
            [f"{m}_clip-vit-b-32_40d36571" for m in ("fd", "isc", "kid")],
        ),
        (
            "dinov2-vit-s-14",
            "1234abcd",
            "tf1-bilinear-224",
            [f"{m}_dinov2-vit-s-14_1234abcd" for m in ("fd", "isc", "kid")],
        ),
        ("classifier", "6726825d", "none", ["fd_classifier", "isc_classifier", "kid_classifier"]),
        ("resnet56-cifar10", "eca1", "none", [f"{m}_resnet56-cifar10" for m in ("fd", "isc", "kid")]),
    ],
)
def test_plain_names_are_for_published_inception_alone(name: str, digest: str, resize: str, names: list[str]) -> None:
    assert names_under(extractor(name, digest, resize), "fd", "isc", "kid") == names


def test_names_of_metrics_are_unique() -> None:
    names = [name for metric in METRICS for name in (metric.name, metric.inception_name) if name]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "under",
    [
        extractor("inception", PUBLISHED_INCEPTION, "tf1-bilinear-299"),
        extractor("inception", "1234abcd", "clean-bicubic-299"),
        extractor("vgg16"),
        extractor("classifier"),
        extractor("my_file"),
    ],
    ids=lambda under: "_".join([under.name, *under.qualifiers]),
)
def test_a_metric_is_found_by_its_name_under_any_extractor(under: Extractor) -> None:
    for metric in METRICS:
        assert metric_named(metric.name_under(under)) is metric


@pytest.mark.parametrize("name", ["auto", "", "fidelity", "precision_classifier", "accuracy"])
def test_what_names_no_metric_is_not_found(name: str) -> None:
    assert metric_named(name) is None


@pytest.mark.parametrize(("name", "higher"), [("fd", False), ("kid", False), ("isc", True), ("recall", True)])
def test_the_direction_of_a_metric_is_that_of_its_paper(name: str, higher: bool) -> None:
    metric = metric_named(name)
    assert metric is not None
    assert metric.higher_is_better is higher


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_can_be_computed_from_its_least_number_of_images(metric: Metric) -> None:
    rows = {seed: normal(metric.least_images, 4, seed) for seed in (0, 1)}
    images = Images(
        generated=Moments.of(rows[0]),
        real=Moments.of(rows[1]),
        logits=normal(metric.least_images, 3, 2),
        labels=torch.zeros(metric.least_images, dtype=torch.int64),
        generated_features=rows[0],
        real_features=rows[1],
    )
    assert np.isfinite(metric.compute(images))
