"""Self-test of an extractor: compares real images with themselves, with their halves and with degraded images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.errors import SaganError, UsageError
from pipeline.evaluation.features import ImageSet, NotFinite, Real
from pipeline.evaluation.frechet_distance import Moments, frechet_distance
from pipeline.evaluation.scorer import Scorer, open_scorer
from sagan.random import Purpose, draw_latents

NOISE = (8.0, 16.0, 32.0, 64.0)  # standard deviations of Gaussian noise, for pixel values 0 … 255
BLUR = (1 / 64, 1 / 32, 1 / 16, 1 / 8)  # radii of a Gaussian blur, as fractions of the image side
ROUNDING = 1e-4  # largest change of a distance by other batches, as a fraction of the variance
LEAST_IMAGES = 4  # a Fréchet distance of halves needs two images in each half
CHANCE = 0.5  # largest distance of halves, as a fraction of the distance at the strongest noise or blur, the smaller


@dataclass(frozen=True)
class Finding:
    """Fréchet distance between real images and other images, and the expected distance."""

    what: str
    """Name of the other images."""
    distance: float | None
    """Fréchet distance. None where features are not finite."""
    expected: str
    """Expected range of the distance."""
    failure: str
    """Meaning of a distance outside the expected range. Empty where the distance is inside."""


@dataclass(frozen=True)
class Degraded:
    """Real images with Gaussian noise or Gaussian blur.

    Attributes:
        real: The real images.
        kind: The degradation.
        strength: Standard deviation of the noise for pixel values 0 … 255, or radius of the blur in pixels.
    """

    real: Real
    kind: Literal["noise", "blur"]
    strength: float

    def __len__(self) -> int:
        return len(self.real)

    def batches(self, part: range, batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        first = part.start
        for images, labels in self.real.batches(part, batch, device):
            if self.kind == "noise":
                noise = draw_latents(0, Purpose.SAMPLE_Z, range(first, first + len(images)), images[0].numel())
                degraded = (images + self.strength * noise.view(images.shape)).round().clamp(0, 255).byte()
            else:
                degraded = torch.stack([_blurred(image, self.strength) for image in images])
            yield degraded, labels
            first += len(images)


def self_test(section: EvaluateSection, reference: str) -> list[Finding]:
    """Test the section's extractor on at most `samples` images of a collection.

    Args:
        section: Extractor, split and number of images.
        reference: URL of the collection.

    Raises UsageError, also where the split has fewer than four images, and EnvironmentFault.
    """
    collection, data = Collection.open(reference), DataSection(train=reference)
    images = Real(collection, collection.evenly_spaced_ids(section.split, section.samples), data)
    if len(images) < LEAST_IMAGES:
        raise UsageError(
            f"the self-test needs at least {LEAST_IMAGES} images, but there are {len(images)}",
            f"set --samples to {LEAST_IMAGES} or more, and name a split that has as many images",
        )
    with open_scorer(section, collection, data, section.seed) as scorer:
        return examine(scorer, images)


def examine(scorer: Scorer, images: Real) -> list[Finding]:
    """Compare at least four real images with the same images in other batches, their halves, noise and blur."""
    try:
        rows = scorer.features(images, "real images", keep=True).rows
    except NotFinite:
        return [Finding("real images", None, "finite features", _NOT_FINITE)]
    assert rows is not None
    real = Moments.of(rows)
    batch = scorer.section.batch // 2 + 1
    other = replace(scorer, section=scorer.section.model_copy(update={"batch": batch}))
    repeated = _moments(other, images, "the same images, in other batches")
    same = _finding("the same images", real, repeated, _RANDOM, most=_rounding(real))
    noise = _increasing(scorer, images, real, "noise", NOISE)
    blur = _increasing(scorer, images, real, "blur", [fraction * scorer.collection.resolution for fraction in BLUR])
    most = CHANCE * min(noise[-1].distance or 0.0, blur[-1].distance or 0.0)
    halves = _finding("their halves", Moments.of(rows[::2]), Moments.of(rows[1::2]), _FEW, most=most)
    return [same, halves, *noise, *blur]


def _increasing(
    scorer: Scorer, images: Real, real: Moments, kind: Literal["noise", "blur"], strengths: Sequence[float]
) -> list[Finding]:
    """Compare real images with images of growing degradation. Each distance should be larger than the one before."""
    findings: list[Finding] = []
    weaker = _rounding(real)
    for strength in strengths:
        degraded = _moments(scorer, Degraded(images, kind, strength), f"{kind} {strength:g}")
        findings.append(_finding(f"{kind} {strength:g}", real, degraded, _BLIND, above=weaker))
        weaker = findings[-1].distance or inf
    return findings


def _moments(scorer: Scorer, images: ImageSet, what: str) -> Moments | None:
    """Return the moments of the features of images; None where a feature is not finite."""
    try:
        return scorer.features(images, what).moments
    except NotFinite:
        return None


def _rounding(real: Moments) -> float:
    """Return the largest distance that rounding in other batches explains."""
    return ROUNDING * float(real.covariance.trace())


def require_passed(findings: list[Finding]) -> None:
    """Raise SaganError with the names of the failed comparisons and the meaning of each failure."""
    failed = {finding.what: finding.failure for finding in findings if finding.failure}
    if failed:
        raise SaganError(f"the self-test fails on {', '.join(failed)}", "; ".join(dict.fromkeys(failed.values())))


def _finding(
    what: str, a: Moments, b: Moments | None, failure: str, *, above: float = -inf, most: float = inf
) -> Finding:
    """Compare `a` with `b`. The distance should be above `above` and at most `most`. Exactly one limit is passed."""
    expected = f"at most {most:.3g}" if above == -inf else f"more than {above:.3g}"
    if b is None:
        return Finding(what, None, expected, _NOT_FINITE)
    distance = frechet_distance(a, b)
    return Finding(what, distance, expected, "" if above < distance <= most else failure)


def _blurred(image: Tensor, radius: float) -> Tensor:
    """Return an image, uint8 [3, H, W], with a Gaussian blur."""
    blurred = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(radius))
    return torch.from_numpy(np.array(blurred)).permute(2, 0, 1)


_NOT_FINITE = "features are not finite: the extractor overflows, or its parameters are damaged"
_RANDOM = (
    "the same images have other features in other batches: the extractor is random or depends on the batch (for "
    "example, dropout or batch norm is in training mode)"
)
_BLIND = (
    "a stronger degradation does not increase the distance: the extractor does not see it, and its scores mean nothing"
)
_FEW = (
    "two halves of the images differ about as much as degraded images do: there are too few images for the number of "
    "features (raise --samples), or the extractor hardly responds to the images"
)
