"""A score says what it is: the protocol under which it was taken is part of its name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Protocol:
    """Everything that a score depends on besides the model. Scores compare only where all of it is equal."""

    extractor: str
    """Name of the feature extractor, e.g. `inception`, `classifier`, `resnet56-cifar10`."""
    extractor_digest: str
    """SHA-256 of the extractor's weights file."""
    resize: str
    """How images reach the extractor's resolution."""
    reference_digest: str
    """Manifest digest of the collection that samples are compared with."""
    split: str
    """The part of that collection."""
    samples: int
    """Generated images."""
    seed: int
    """Seed of their latents and labels."""
    weights: str
    """Generator weights: `ema` or `raw`."""
    batch_norm: str
    """Batch-norm statistics: `standing` and over how many images, or `running`."""
    precision: str = "float32"
    """What the extractor computes in: `float32` (without TF32) or `float64`."""
    repeats: int = 1
    """Ranges of `samples` images whose scores are averaged."""

    @property
    def id8(self) -> str:
        """First 8 hex digits of the SHA-256 of the protocol."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]

    def key(self, metric: str) -> str:
        """The metric's name in the tracker and the registry: `fid/3fa9c1d2`."""
        return f"{metric}/{self.id8}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
