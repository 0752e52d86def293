"""The interface of extractors: networks that map images to features and logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.evaluation.extractors.published_networks import published

Network = Callable[[Tensor], tuple[Tensor, Tensor]]
Dtype = Literal["float32", "float64"]


@dataclass(frozen=True)
class Extractor:
    """Maps images uint8 [n, 3, H, W] to (features [n, D], logits [n, K]), both of type `dtype`."""

    name: str
    digest: str
    """SHA-256 of the file with the network's parameters."""
    network: Network
    resize: str = "none"
    """Method that resizes images to the network's resolution, or `none`."""
    dtype: Dtype = "float32"
    device: str = "cpu"
    has_logits: bool = True
    """Whether K > 0."""

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        dtype = getattr(torch, self.dtype)
        features, logits = self.network(images.to(self.device))
        return features.to(dtype), logits.to(dtype)

    @property
    def qualifiers(self) -> list[str]:
        """Parts that are appended to a metric's name to identify this extractor.

        The list is empty for `inception` with the published parameters and TensorFlow's resize. The plain names `fid`,
        `isc` and `kid` therefore mean this extractor. Other extractors append their name. A known network without the
        published parameters also appends 8 digits of their digest. The antialiased resize appends `clean`.
        """
        known = published(self.name)
        is_published = known is None or self.digest == known.digest
        name = [] if self.name == "inception" and is_published else [self.name]
        digest = [] if is_published else [self.digest[:8]]
        clean = ["clean"] if self.resize.startswith("clean") else []
        return [*name, *digest, *clean]
