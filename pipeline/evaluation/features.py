"""Computes features of generated and real images in chunks, in this process or on Ray workers in parallel.

The chunks do not depend on the number of workers, and their sums are merged in order. Neither the number of workers nor
the batch size changes a score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.collection.manifest import Collection
from pipeline.compute.actor_pool import ActorPool
from pipeline.compute.resources import require_resources
from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.errors import UsageError
from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.evaluation.frechet_distance import Moments
from pipeline.streaming.read_images import read_images
from sagan.random import Purpose, draw_labels, draw_latents
from sagan.trained_model import Model

# About 50 chunks keep any number of workers busy. Summing a chunk of 1 024 images costs less than extracting its
# features. Chunk sizes are multiples of 64, the default batch size.
CHUNKS, LEAST_CHUNK, LARGEST_CHUNK = 50, 64, 1024


class NotFinite(UsageError):
    """An extractor gives features or logits that are not finite."""


class ImageSet(Protocol):
    """An ordered set of images whose features are computed."""

    def __len__(self) -> int: ...

    def batches(self, part: range, batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images uint8 [n, 3, H, W], labels int64 [n]) of the images in `part`, with n ≤ `batch`."""


@dataclass(frozen=True)
class Generated:
    """Images that a model generates.

    Attributes:
        model: The model.
        seed: Seed of latents and labels.
        samples: Numbers of the images. Image i is generated from row i of the streams (seed, sample).
    """

    model: Model
    seed: int
    samples: range

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, part: range, batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        model, classes = self.model.to(device), self.model.config.known_num_classes
        for start in range(part.start, part.stop, batch):
            positions = self.samples[start : min(start + batch, part.stop)]
            z = draw_latents(self.seed, Purpose.SAMPLE_Z, positions, model.config.z_dim)
            y = draw_labels(self.seed, Purpose.SAMPLE_Y, positions, max(classes, 1))
            yield model.generate(z, y if classes else None), y


@dataclass(frozen=True)
class Real:
    """Images of a collection.

    Attributes:
        collection: The collection.
        ids: Sample ids, int [n].
        data: Shard cache and number of decoding threads.
    """

    collection: Collection
    ids: np.ndarray
    data: DataSection

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, part: range, batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        ids, data = self.ids[part.start : part.stop], self.data
        labels = torch.from_numpy(self.collection.labels[ids]).split(batch)
        images = read_images(self.collection, ids, data.cache, data.cache_gb, data.threads, batch)
        return zip(images, labels, strict=True)


@dataclass(frozen=True)
class Features:
    """Outputs of an extractor for n images, in the order of the images.

    Attributes:
        moments: Moments of the features, over D dimensions.
        logits: float32 or float64 [n, K].
        labels: int64 [n]. Requested classes of generated images, true classes of real images.
        rows: Features, float32 or float64 [n, D]. None where they were not kept.
    """

    moments: Moments
    logits: Tensor
    labels: Tensor
    rows: Tensor | None

    @classmethod
    def merged(cls, chunks: Iterable[Features]) -> Features:
        """Merge the features of one or more consecutive chunks."""
        moments, *columns = zip(*((c.moments, c.logits, c.labels, c.rows) for c in chunks), strict=True)
        logits, labels, rows = (None if column[0] is None else torch.cat(column) for column in columns)
        assert logits is not None
        assert labels is not None
        return cls(reduce(Moments.merge, moments), logits, labels, rows)


def chunks_of(count: int) -> list[range]:
    """Return the chunks of `count` images. They depend on `count` alone."""
    size = min(LARGEST_CHUNK, LEAST_CHUNK * -(-count // (CHUNKS * LEAST_CHUNK)))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def extract(
    extractor: Extractor,
    images: ImageSet,
    part: range,
    *,
    batch: int,
    keep: bool,
    advance: Callable[[int], None] = lambda images: None,
) -> Features:
    """Compute the features of one part of `images`.

    Args:
        extractor: The extractor.
        images: The images.
        part: Indices of the part in `images`.
        batch: Largest number of images per forward pass.
        keep: Whether the result keeps the features as `rows`.
        advance: Called with the number of images after each batch.

    Raises NotFinite.
    """
    rows, logits, labels = [], [], []
    for pixels, y in images.batches(part, batch, extractor.device):
        features, scores = extractor(pixels)
        rows.append(features.cpu())
        logits.append(scores.cpu())
        if not (rows[-1].isfinite().all() and logits[-1].isfinite().all()):
            raise NotFinite(
                f"the extractor {extractor.name} gives features or logits that are not finite (NaN or infinity): it "
                "overflows, or its parameters are damaged",
                "set evaluate.extractor, or the file of its parameters, to another one; "
                "`sagan evaluate --self-test` tests an extractor",
            )
        labels.append(y)
        advance(len(y))
    joined = torch.cat(rows)
    return Features(Moments.of(joined), torch.cat(logits), torch.cat(labels), joined if keep else None)


def feature_actors(section: EvaluateSection, load: Callable[[str], Extractor]) -> ActorPool:
    """Start `evaluate.workers` processes on the connected cluster. Each process loads its extractor by `load(device)`.

    Raises EnvironmentFault where the cluster has too few CPUs or GPUs.
    """
    require_resources(
        section.workers,
        "evaluation workers",
        section.cpus,
        section.gpus,
        lambda fit: f"set evaluate.workers={max(1, fit)}, lower evaluate.cpus or evaluate.gpus, or add nodes",
    )
    make = partial(FeatureWorker, load, max(1, int(section.cpus)), bool(section.gpus))
    return ActorPool(make, section.workers, section.cpus, section.gpus)


class FeatureWorker:
    """Computes features in one process of `feature_actors`."""

    def __init__(self, load: Callable[[str], Extractor], threads: int, gpu: bool) -> None:
        torch.set_num_threads(threads)
        self._extractor = load("cuda" if gpu and torch.cuda.is_available() else "cpu")

    def extract(self, images: ImageSet, part: range, *, batch: int, keep: bool) -> Features:
        return extract(self._extractor, images, part, batch=batch, keep=keep)
