"""The table of metrics: name, direction, inputs and computation of each.

torch-fidelity's functions compute the inception score, KID, precision and recall. `frechet_distance.py` computes the
Fréchet distance. Values are comparable with values in papers that use torch-fidelity. A new metric is one entry of
`METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.evaluation.extractors.published_networks import import_torch_fidelity
from pipeline.evaluation.frechet_distance import Moments, frechet_distance

ISC_SPLITS = 10
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
_ROWS = 1000  # rows whose distances are in memory at the same time

Needs = Literal["moments", "logits", "class labels", "features"]


@dataclass(frozen=True)
class Images:
    """Outputs of an extractor for generated images and real images.

    Attributes:
        generated: Moments of the generated images' features.
        real: Moments of the real images' features.
        logits: Logits of the generated images, float [n, K].
        labels: Requested classes of the generated images, int64 [n].
        generated_features: Float [n, D]. None where features were not kept.
        real_features: Float [m, D]. None where features were not kept.
    """

    generated: Moments
    real: Moments
    logits: Tensor
    labels: Tensor
    generated_features: Tensor | None
    real_features: Tensor | None

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        """Features of the generated images and of the real images. Both must have been kept."""
        assert self.generated_features is not None
        assert self.real_features is not None
        return self.generated_features, self.real_features

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        return precision_recall(*self.features)

    @cached_property
    def density_coverage(self) -> tuple[float, float]:
        return density_coverage(*self.features)


@dataclass(frozen=True)
class Metric:
    """One entry of the table."""

    name: str
    higher_is_better: bool
    needs: Needs
    """Inputs of the computation. `moments` are always available. `logits` need an extractor with logits. `class labels`
    need an extractor that recognises the collection's classes. `features` need `evaluate.feature_metrics`."""
    compute: Callable[[Images], float]
    by_extractor: bool = True
    """Whether the extractor is part of the name, as in `fd_vgg16`."""
    least_images: int = 1
    """Least number of generated images, and of real images, from which the metric can be computed."""
    inception_name: str = ""
    """Name under Inception where it differs from `name`; otherwise empty."""

    def name_under(self, extractor: Extractor) -> str:
        """Return the name of the metric on the features of `extractor`."""
        if not self.by_extractor:
            return self.name
        first = self.inception_name if self.inception_name and extractor.name == "inception" else self.name
        return "_".join([first, *extractor.qualifiers])

    def is_called(self, name: str) -> bool:
        """Return whether `name` is the name of this metric under any extractor."""
        names = [self.name, self.inception_name] if self.inception_name else [self.name]
        return name in names or (self.by_extractor and name.startswith(tuple(f"{n}_" for n in names)))


def inception_score(logits: Tensor, splits: int = ISC_SPLITS) -> float:
    """Compute the inception score, exp E KL(p(y|x) ‖ p(y)), of logits [N, K].

    The score is the mean over `splits` shuffled parts, or over N parts where N is less.
    """
    import_torch_fidelity()
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    splits = min(splits, len(logits))
    return float(isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=2020)[KEY_METRIC_ISC_MEAN])


def kernel_distance(generated: Tensor, real: Tensor) -> float:
    """Compute the KID of features [N, D] and [M, D].

    The KID is the mean over 100 subsets of 1 000 rows, or of min(N, M) rows where this is less.
    """
    import_torch_fidelity()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    metric = kid_features_to_metric(
        generated, real, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=2020, verbose=False
    )
    return float(metric[KEY_METRIC_KID_MEAN])


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkäänniemi et al. 2019) of features [N, D] and [M, D].

    Uses k = 3 neighbours, and needs N, M > 3.
    """
    import_torch_fidelity()
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    metric = prc_features_to_metric(
        generated, real, prc_neighborhood=PRECISION_NEIGHBOURS, prc_batch_size=1000, save_cpu_ram=True, verbose=False
    )
    return float(metric[KEY_METRIC_PRECISION]), float(metric[KEY_METRIC_RECALL])


def density_coverage(generated: Tensor, real: Tensor, k: int = DENSITY_NEIGHBOURS) -> tuple[float, float]:
    """Compute density and coverage (Naeem et al. 2020) of features [N, D] and [M, D]; needs M > k.

    The ball of a real image reaches to its k-th nearest other real image. Density is the number of balls that contain a
    generated image, divided by k and averaged over generated images. Coverage is the share of real images whose ball
    contains at least one generated image.
    """
    generated, real = generated.double(), real.double()
    # The nearest image to an image is itself, so the k-th other image has the (k + 1)-th smallest distance.
    radii = torch.cat([torch.cdist(rows, real).kthvalue(k + 1).values for rows in real.split(_ROWS)])
    balls, covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for rows in generated.split(_ROWS):
        inside = torch.cdist(rows, real) < radii
        balls += int(inside.sum())
        covered |= inside.any(0)
    return balls / (k * len(generated)), float(covered.double().mean())


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Compute the share of rows of logits [N, K] whose largest value is at the row's label. Labels are int64 [N]."""
    return float((logits.argmax(1) == labels).double().mean())


METRICS = (
    Metric(
        "fd", False, "moments", lambda i: frechet_distance(i.generated, i.real), least_images=2, inception_name="fid"
    ),
    Metric("isc", True, "logits", lambda i: inception_score(i.logits)),
    Metric("class_accuracy", True, "class labels", lambda i: class_accuracy(i.logits, i.labels), by_extractor=False),
    Metric("kid", False, "features", lambda i: kernel_distance(*i.features), least_images=2),
    Metric("precision", True, "features", lambda i: i.precision_recall[0], False, PRECISION_NEIGHBOURS + 1),
    Metric("recall", True, "features", lambda i: i.precision_recall[1], False, PRECISION_NEIGHBOURS + 1),
    Metric("density", True, "features", lambda i: i.density_coverage[0], False, DENSITY_NEIGHBOURS + 1),
    Metric("coverage", True, "features", lambda i: i.density_coverage[1], False, DENSITY_NEIGHBOURS + 1),
)
FRECHET_DISTANCE = next(metric for metric in METRICS if metric.name == "fd")
"""The metric that `evaluate.score: auto` selects."""


def metric_named(name: str) -> Metric | None:
    """Return the metric that is called `name` under any extractor, or None."""
    return next((metric for metric in METRICS if metric.is_called(name)), None)


def least_images_per_class(features: int) -> int:
    """Return the least number of images of one class for a Fréchet distance of `features` features: two per feature.

    With fewer images the distance is mostly noise. It was measured on real CIFAR-10 images (500 per class, 64 features
    of ResNet-56, mean over the classes). Two halves of a class are 0.69, 0.19, 0.10 and 0.05 of the class's variance
    apart with 1/4, 1, 2 and 4 images per feature in each half. JPEG compression of quality 50 moves a class by 0.4 to
    1.4 of its variance. Another class is 7 times the variance away.
    """
    return 2 * features


def class_distance(generated: Tensor, real: Tensor) -> float | None:
    """Compute the Fréchet distance of one class's features [n, D] and [m, D].

    Returns None where n or m is below `least_images_per_class`.
    """
    if min(len(generated), len(real)) < least_images_per_class(real.shape[1]):
        return None
    return frechet_distance(Moments.of(generated), Moments.of(real))
