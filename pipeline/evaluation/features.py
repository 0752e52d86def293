"""What an extractor says of generated and of real images: chunk by chunk, here or on Ray workers side by side.

Chunks are the same whoever works on them, and their sums are merged in their order: neither the number of workers nor
the batch has a say in a score.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import cycle
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import DataSection
from pipeline.data.index import Collection
from pipeline.data.stream import read_images
from pipeline.errors import EnvironmentFault
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.statistics import Moments
from sagan.random import Purpose, labels, latents
from sagan.sampling import Model

# Some fifty chunks keep any number of workers busy; 1 024 images cost less to sum than to look at. 64: whole batches.
CHUNKS, LEAST_CHUNK, LARGEST_CHUNK = 50, 64, 1024
AHEAD = 2  # chunks that wait at each worker, so that none is idle while an earlier one is fetched


class Images(Protocol):
    """Images to look at: some number of them, in an order."""

    def __len__(self) -> int: ...

    def batches(self, part: range, batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 [n, 3, H, W], their labels int64 [n]) of a part of them, n ≤ `batch` at a time."""


@dataclass(frozen=True)
class Generated:
    """A model's images. Number i is made of row i of the streams (seed, sample)."""

    model: Model
    seed: int
    samples: range

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, part: range, batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        model, classes = self.model.to(device), self.model.config.labels
        for start in range(part.start, part.stop, batch):
            positions = self.samples[start : min(start + batch, part.stop)]
            z = latents(self.seed, Purpose.SAMPLE_Z, positions, model.config.z_dim)
            y = labels(self.seed, Purpose.SAMPLE_Y, positions, max(classes, 1))
            yield model.generate(z, y if classes else None), y


@dataclass(frozen=True)
class Real:
    """Images of a collection, by their ids."""

    collection: Collection
    ids: np.ndarray
    data: DataSection

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, part: range, batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        ids, data = self.ids[part.start : part.stop], self.data
        truth = torch.from_numpy(self.collection.labels[ids]).split(batch)
        images = read_images(self.collection, ids, data.cache, data.cache_gb, data.threads, batch)
        return zip(images, truth, strict=True)


@dataclass(frozen=True)
class Features:
    """What an extractor says of n images, in their order.

    Attributes:
        moments: of their features, [D].
        logits: float32 [n, K].
        labels: int64 [n], asked for or true.
        rows: the features, float32 or float64 [n, D], where they were asked for.
    """

    moments: Moments
    logits: Tensor
    labels: Tensor
    rows: Tensor | None

    @classmethod
    def merged(cls, chunks: Iterable[Features]) -> Features:
        """Those of chunks that follow each other, at least one."""
        moments, *columns = zip(*((c.moments, c.logits, c.labels, c.rows) for c in chunks), strict=True)
        logits, y, rows = (None if column[0] is None else torch.cat(column) for column in columns)
        assert logits is not None
        assert y is not None
        return cls(reduce(Moments.merge, moments), logits, y, rows)


def chunks_of(count: int) -> list[range]:
    """The parts that `count` images are worked on in; they depend on nothing else."""
    size = min(LARGEST_CHUNK, LEAST_CHUNK * -(-count // (CHUNKS * LEAST_CHUNK)))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def extract(
    extractor: Extractor,
    images: Images,
    part: range,
    *,
    batch: int,
    keep: bool,
    advance: Callable[[int], None] = lambda images: None,
) -> Features:
    """Those of one part of `images`, with their rows where they are to be kept; `advance` is told of each batch."""
    rows, logits, labels = [], [], []
    for pixels, y in images.batches(part, batch, extractor.device):
        features, scores = extractor(pixels)
        rows.append(features.cpu())
        logits.append(scores.cpu())
        labels.append(y)
        advance(len(y))
    together = torch.cat(rows)
    return Features(Moments.of(together), torch.cat(logits), torch.cat(labels), together if keep else None)


class Workers:
    """Ray workers that hold an extractor each. `load` makes it for a device there.

    Raises EnvironmentFault where the cluster has no room for them, since Ray would wait in silence.
    """

    def __init__(self, count: int, load: Callable[[str], Extractor], cpus: float, gpus: float) -> None:
        import ray

        have = ray.cluster_resources()
        for resource, each in (("CPU", cpus), ("GPU", gpus)):
            if count * each > have.get(resource, 0):
                raise EnvironmentFault(
                    f"{count} evaluation workers need {count * each:g} {resource}s; "
                    f"the cluster has {have.get(resource, 0):g}",
                    "lower evaluate.workers or what each of them gets, or add nodes",
                )
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": -1}
        worker = ray.remote(FeatureWorker).options(**options)
        self._load = [ray.put(load)]  # kept, for a worker that takes the place of a dead one
        self._actors = [worker.remote(self._load, max(1, int(cpus)), bool(gpus)) for _ in range(count)]

    def map(self, images: Images, parts: Sequence[range], *, batch: int, keep: bool) -> Iterator[Features]:
        """`extract` of every part, in their order."""
        import ray

        # In a list, since Ray would fetch it anew for every call; the worker keeps what it has fetched.
        reference, asked = [ray.put(images)], deque[Any]()
        for actor, part in zip(cycle(self._actors), parts, strict=False):
            asked.append(actor.extract.remote(reference, part, batch, keep))
            if len(asked) > AHEAD * len(self._actors):
                yield ray.get(asked.popleft())
        while asked:
            yield ray.get(asked.popleft())

    def stop(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)


class FeatureWorker:
    """In a process of its own."""

    def __init__(self, load: list[Any], threads: int, gpu: bool) -> None:
        import ray

        torch.set_num_threads(threads)
        self._extractor = ray.get(load[0])("cuda" if gpu and torch.cuda.is_available() else "cpu")
        self._reference: Any = None
        self._images: Images

    def extract(self, reference: list[Any], part: range, batch: int, keep: bool) -> Features:
        import ray

        if self._reference != reference[0]:
            self._reference, self._images = reference[0], ray.get(reference[0])
        return extract(self._extractor, self._images, part, batch=batch, keep=keep)
