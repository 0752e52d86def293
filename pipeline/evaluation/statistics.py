"""First and second moments of features, the Fréchet distance between two of them, and those of real images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import DataSection
from pipeline.data.index import Collection
from pipeline.data.stream import read_images
from pipeline.evaluation.derived import Tensors, derived
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.metrics import class_accuracy
from pipeline.evaluation.progress import shown

log = logging.getLogger(__name__)


@dataclass
class Moments:
    """Count, mean and scatter of rows seen so far; float64, so that parts merge to the same numbers in any order."""

    count: int
    mean: Tensor
    """float64 [D]"""
    scatter: Tensor
    """float64 [D, D]: Σ (x − mean)(x − mean)ᵀ"""

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Those of features [n, D], n ≥ 1."""
        x = features.detach().to("cpu", torch.float64)
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: Moments) -> Moments:
        """Those of both sets together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        difference = other.mean - self.mean
        return Moments(
            count,
            self.mean + difference * (other.count / count),
            self.scatter + other.scatter + difference.outer(difference) * (self.count * other.count / count),
        )

    @property
    def covariance(self) -> Tensor:
        """float64 [D, D], unbiased. Raises ValueError for a single row."""
        if self.count < 2:
            raise ValueError("a covariance needs at least two images")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m₁ − m₂|² + tr S₁ + tr S₂ − 2 tr (S₁S₂)^½ (Heusel et al. 2017, equation 6).

    S₁S₂ has the eigenvalues of the symmetric S₁^½ S₂ S₁^½, which are real and cheaper than those of the product.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0)
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * product.sqrt().sum()
    return float(distance)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: moments of a split's features under an extractor."""

    moments: Moments
    accuracy: float | None
    """Share of the real images whose class the extractor's logits name; None where its classes are others."""


def reference(collection: Collection, split: str, extractor: Extractor, data: DataSection, batch: int) -> Reference:
    """Moments over all images of a split, computed once and kept beside the collection."""

    def make() -> tuple[Tensors, dict[str, float | int | None]]:
        ids = np.asarray(collection.ids(split))
        moments, logits = None, []
        for features, part in shown(_real(collection, ids, extractor, data, batch), len(ids), f"real images, {split}"):
            moments = Moments.of(features) if moments is None else moments.merge(Moments.of(features))
            logits.append(part.cpu())
        assert moments is not None
        speaks_of_classes = collection.classes > 1 and logits[0].shape[1] == collection.classes
        accuracy = class_accuracy(torch.cat(logits), torch.from_numpy(collection.labels[ids]))
        facts = {"count": moments.count, "accuracy": accuracy if speaks_of_classes else None}
        return {"mean": moments.mean, "scatter": moments.scatter}, facts

    tensors, facts, _ = derived(collection, f"statistics-{_identity(extractor)}-{split}", make)
    return Reference(Moments(facts["count"], tensors["mean"], tensors["scatter"]), facts["accuracy"])


def spread(collection: Collection, split: str, count: int) -> np.ndarray:
    """Ids of min(count, size) samples spread evenly over a split."""
    ids = np.asarray(collection.ids(split))
    return ids[np.arange(min(count, len(ids))) * len(ids) // min(count, len(ids))]


def reference_features(
    collection: Collection, split: str, extractor: Extractor, data: DataSection, batch: int, count: int
) -> Tensor:
    """float32 [min(count, size), D]: features of the images of `spread`, kept beside the collection."""
    ids = spread(collection, split, count)

    def make() -> tuple[Tensors, dict[str, int]]:
        return {"features": torch.cat([f.cpu() for f, _ in _real(collection, ids, extractor, data, batch)])}, {}

    tensors, _, _ = derived(collection, f"features-{_identity(extractor)}-{split}-{len(ids)}", make)
    return tensors["features"]


def _real(
    collection: Collection, ids: np.ndarray, extractor: Extractor, data: DataSection, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(features, logits) of real images in the order of `ids`, at most `batch` at a time."""
    for images in read_images(collection, ids, data.cache, data.cache_gb, data.threads):
        for part in images.split(batch):
            yield extractor(part)


def _identity(extractor: Extractor) -> str:
    return f"{extractor.name}-{extractor.digest[:8]}-{extractor.resize}"
