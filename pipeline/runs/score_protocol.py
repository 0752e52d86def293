"""A score and its protocol. Scores under different protocols cannot be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class ScoreProtocol(BaseModel):
    """All values that a score depends on besides the model. Two scores can be compared only if all values are equal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    extractor: str
    """Name of the feature extractor: `inception`, `classifier`, `resnet56-cifar10`, …"""
    extractor_digest: str
    """SHA-256 of the file with the extractor's parameters."""
    resize: str
    """Method that resizes images to the extractor's resolution."""
    reference_digest: str
    """Digest of the manifest of the reference collection."""
    split: str
    """Split of the reference collection."""
    samples: int
    """Number of generated images."""
    seed: int
    """Seed of the latents and labels of the generated images."""
    weights: str
    """Parameters of the generator: `ema` or `raw`."""
    batch_norm: str
    """Batch-norm statistics: `standing N` over N images, or `running`."""
    extractor_dtype: str = "float32"
    """Floating-point type of the extractor: `float32` (without TF32) or `float64`."""
    repeats: int = 1
    """Number of ranges of `samples` images whose scores are averaged."""

    @property
    def id8(self) -> str:
        """First 8 hex digits of the SHA-256 of the protocol."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]

    def key(self, metric: str) -> str:
        """Return the name of a metric under this protocol in the tracker and the registry: `fid/3fa9c1d2`."""
        return f"{metric}/{self.id8}"

    def to_dict(self) -> dict[str, Any]:
        """Return the protocol as a dict of JSON values."""
        return self.model_dump()


class Score(BaseModel):
    """Metrics of one model under one protocol. One of the metrics ranks models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    """Name of the ranking metric."""
    value: float | None
    """Value of the ranking metric; None where the model generates images that are not finite."""
    higher_is_better: bool
    """Direction of the ranking metric."""
    values: dict[str, float]
    """All metrics by name; empty where the model generates images that are not finite."""
    deviations: dict[str, float] = {}
    """Standard deviation of each value over the protocol's repeats; empty for one repeat."""
    protocol: ScoreProtocol

    @classmethod
    def of(
        cls,
        protocol: ScoreProtocol,
        metric: str,
        higher_is_better: bool,
        values: Mapping[str, float],
        deviations: Mapping[str, float] | None = None,
    ) -> Score:
        """Return a score with the value `values[metric]`; its value is None where `values` is empty."""
        return cls(
            metric=metric,
            value=values.get(metric),
            higher_is_better=higher_is_better,
            values=dict(values),
            deviations=dict(deviations or {}),
            protocol=protocol,
        )

    @property
    def key(self) -> str:
        """Name of the ranking metric under the protocol: `fid/3fa9c1d2`."""
        return self.protocol.key(self.metric)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of `value` over the protocol's repeats; None for one repeat."""
        return self.deviations.get(self.metric)


def better_first(score: Score) -> float:
    """Return a sort key for scores of one metric. A better score has a smaller key. `score.value` must not be None."""
    assert score.value is not None
    return -score.value if score.higher_is_better else score.value


def comparable(scores: Iterable[Score], last: Score) -> list[Score]:
    """Return the scores that can be compared with `last`, each with the ranking metric of `last`.

    A score can be compared where its protocol equals that of `last` and where it has the ranking metric of `last`.
    """
    return [
        Score.of(s.protocol, last.metric, last.higher_is_better, s.values, s.deviations)
        for s in scores
        if s.protocol == last.protocol and last.metric in s.values
    ]
