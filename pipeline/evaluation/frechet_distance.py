"""First and second moments of features, and the Fréchet distance between two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Count, mean and scatter of rows of features, in float64 so that parts merge to the same numbers in any order."""

    count: int
    mean: Tensor
    """float64 [D]"""
    scatter: Tensor
    """float64 [D, D]: Σ (x − mean)(x − mean)ᵀ"""

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Compute the moments of features [n, D], n ≥ 1."""
        x = features.detach().to("cpu", torch.float64)
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of the union of both sets (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        difference = other.mean - self.mean
        return Moments(
            count,
            self.mean + difference * (other.count / count),
            self.scatter + other.scatter + difference.outer(difference) * (self.count * other.count / count),
        )

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, float64 [D, D]. Raises ValueError for a single row."""
        if self.count < 2:
            raise ValueError("a covariance needs at least two images")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Compute |m₁ − m₂|² + tr S₁ + tr S₂ − 2 tr (S₁S₂)^½ (Heusel et al. 2017, equation 6).

    S₁S₂ and the symmetric matrix S₁^½ S₂ S₁^½ have the same eigenvalues. The symmetric matrix has real
    eigenvalues, which are cheaper to compute.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0)
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * product.sqrt().sum()
    return float(distance)
