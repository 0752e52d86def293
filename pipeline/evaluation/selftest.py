"""Whether scores under an extractor can mean something: real images beside themselves and beside spoilt ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.data.index import Collection
from pipeline.errors import SaganError
from pipeline.evaluation.evaluator import Evaluator, open_evaluator, spread
from pipeline.evaluation.features import Real
from pipeline.evaluation.statistics import Moments, frechet_distance
from sagan.random import Purpose, latents

NOISE = (8.0, 16.0, 32.0, 64.0)  # standard deviations, of values 0 … 255
BLUR = (1 / 64, 1 / 32, 1 / 16, 1 / 8)  # of a Gaussian, as parts of the side
ROUNDING = 1e-4  # of the variance: what another batch may change
CHANCE = 0.5  # of what spoils most: how far apart halves may be


@dataclass(frozen=True)
class Finding:
    """Real images against something: their Fréchet distance."""

    what: str
    distance: float | None
    """None where features are not finite."""
    expected: str
    """What it should be."""
    failure: str
    """What it means that it is not; "" where it is."""


@dataclass(frozen=True)
class Spoilt:
    """Real images with Gaussian noise of deviation `strength`, or blurred by a Gaussian of that many pixels."""

    real: Real
    how: Literal["noise", "blur"]
    strength: float

    def __len__(self) -> int:
        return len(self.real)

    def batches(self, part: range, batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        first = part.start
        for images, labels in self.real.batches(part, batch, device):
            if self.how == "noise":
                noise = latents(0, Purpose.SAMPLE_Z, range(first, first + len(images)), images[0].numel())
                spoilt = (images + self.strength * noise.view(images.shape)).round().clamp(0, 255).byte()
            else:
                spoilt = torch.stack([_blurred(image, self.strength) for image in images])
            yield spoilt, labels
            first += len(images)


def run(section: EvaluateSection, reference: str) -> list[Finding]:
    """Try the section's extractor on at most `samples` images of a collection. Raises UsageError, EnvironmentFault."""
    collection, data = Collection.open(reference), DataSection(train=reference)
    images = Real(collection, spread(collection, section.split, section.samples), data)
    with open_evaluator(section, collection, data, section.seed) as evaluator:
        return examine(evaluator, images)


def examine(evaluator: Evaluator, images: Real) -> list[Finding]:
    """What the extractor makes of at least four images, of themselves again, of their halves, of noise and of blur."""
    rows = evaluator.features(images, "real images", keep=True).rows
    assert rows is not None
    if not rows.isfinite().all():
        return [Finding("real images", None, "finite features", _NOT_FINITE)]
    real = Moments.of(rows)
    batch = evaluator.section.batch // 2 + 1
    other = replace(evaluator, section=evaluator.section.model_copy(update={"batch": batch}))
    again = other.features(images, "again, in other batches").moments
    same = _finding("the same again", real, again, _RANDOM, most=_rounding(real))
    noise = _growing(evaluator, images, real, "noise", NOISE)
    blur = _growing(evaluator, images, real, "blur", [part * evaluator.collection.resolution for part in BLUR])
    most = CHANCE * min(noise[-1].distance or 0.0, blur[-1].distance or 0.0)
    halves = _finding("its halves", Moments.of(rows[::2]), Moments.of(rows[1::2]), _FEW, most=most)
    return [same, halves, *noise, *blur]


def _growing(
    evaluator: Evaluator, images: Real, real: Moments, how: Literal["noise", "blur"], strengths: Sequence[float]
) -> list[Finding]:
    """Each should be further from `real` than the one before."""
    found: list[Finding] = []
    weaker = _rounding(real)
    for strength in strengths:
        made = evaluator.features(Spoilt(images, how, strength), f"{how} {strength:g}").moments
        found.append(_finding(f"{how} {strength:g}", real, made, _BLIND, above=weaker))
        weaker = found[-1].distance or inf
    return found


def _rounding(real: Moments) -> float:
    return ROUNDING * float(real.covariance.trace())


def require_passed(findings: list[Finding]) -> None:
    """Raise SaganError with what failed and what that means."""
    failed = {finding.what: finding.failure for finding in findings if finding.failure}
    if failed:
        raise SaganError(f"the self-test fails on {', '.join(failed)}", "; ".join(dict.fromkeys(failed.values())))


def _finding(what: str, a: Moments, b: Moments, failure: str, *, above: float = -inf, most: float = inf) -> Finding:
    """The distance should be more than `above` and at most `most`, of which one is given."""
    expected = f"at most {most:.3g}" if above == -inf else f"more than {above:.3g}"
    if not b.scatter.isfinite().all():
        return Finding(what, None, expected, _NOT_FINITE)
    distance = frechet_distance(a, b)
    return Finding(what, distance, expected, "" if above < distance <= most else failure)


def _blurred(image: Tensor, radius: float) -> Tensor:
    """uint8 [3, H, W]."""
    blurred = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(radius))
    return torch.from_numpy(np.array(blurred)).permute(2, 0, 1)


_NOT_FINITE = "features are not finite: the extractor overflows, or its weights are damaged"
_RANDOM = (
    "the same images do not have the same features: something in the extractor is random or depends on the batch "
    "(dropout or batch norm left in training mode)"
)
_BLIND = "what is spoilt more is not further away: the extractor does not see it, and scores under it mean nothing"
_FEW = (
    "halves of the same images are as far apart as spoilt ones: too few images for so many features (--samples), or an "
    "extractor that hardly looks at them"
)
