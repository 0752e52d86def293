"""What models are measured with: an extractor, the real images of a collection, and the workers that look at them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.data.index import Collection
from pipeline.errors import UsageError
from pipeline.evaluation import extractors, metrics
from pipeline.evaluation.classifier import classifier
from pipeline.evaluation.derived import Tensors, derived
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.features import Features, Images, Real, Workers, chunks_of, extract
from pipeline.evaluation.progress import progress
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.statistics import Moments


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: moments of a split's features under an extractor."""

    moments: Moments
    accuracy: float | None
    """Share of the real images whose class the extractor's logits name; None where its classes are others."""


@dataclass(frozen=True)
class Evaluator:
    """An extractor, what it is compared on, and how. `open_evaluator` makes it."""

    section: EvaluateSection
    collection: Collection
    data: DataSection
    extractor: Extractor
    workers: Workers | None
    """None: this process does it."""
    _seen: dict[str, Tensor] = field(default_factory=dict)
    """Features of all images of a split, where there are few enough to be compared with as they are."""

    def protocol(self, kind: tuple[str, str], *, seed: int, samples: int, repeats: int = 1) -> Protocol:
        """`kind`: weights and batch-norm statistics of the model, as it names them."""
        weights, batch_norm = kind
        return Protocol(
            extractor=self.extractor.name,
            extractor_digest=self.extractor.digest,
            resize=self.extractor.resize,
            precision=self.extractor.precision,
            reference_digest=self.collection.digest,
            split=self.section.split,
            samples=samples,
            seed=seed,
            weights=weights,
            batch_norm=batch_norm,
            repeats=repeats,
        )

    @property
    def metric_names(self) -> list[str]:
        """Short names of what may be measured; the first is what `score: auto` means."""
        metric = self.extractor.metric
        names = [metric("fd"), *([metric("isc"), "class_accuracy"] if self.extractor.has_logits else [])]
        return [*names, metric("kid"), "precision", "recall"] if self.section.precision_recall else names

    def ranking(self) -> str:
        """Short name of the metric that ranks. Raises UsageError for one that is not measured."""
        names, score = self.metric_names, self.section.score
        if score == "auto":
            return names[0]
        if score not in names:
            more = "" if self.section.precision_recall else " (kid, precision, recall: evaluate.precision_recall: true)"
            raise UsageError(
                f"evaluate.score is {score!r}, which extractor {self.extractor.name} does not give",
                f"choose auto or one of: {', '.join(names)}{more}",
            )
        return score

    def features(self, images: Images, what: str, *, keep: bool = False) -> Features:
        """Those of all the images, named `what` while their progress is shown; with their rows where `keep` asks."""
        parts, batch = chunks_of(len(images)), self.section.batch
        with progress(len(images), what) as advance:
            if self.workers is None:
                chunks = [extract(self.extractor, images, p, batch=batch, keep=keep, advance=advance) for p in parts]
            else:
                chunks = []
                for chunk in self.workers.map(images, parts, batch=batch, keep=keep):
                    advance(len(chunk.labels))
                    chunks.append(chunk)
        return Features.merged(chunks)

    def reference(self, split: str) -> Reference:
        """Of all images of a split, computed once and kept beside the collection."""
        collection = self.collection

        def make() -> tuple[Tensors, dict[str, float | int | None]]:
            ids = np.asarray(collection.ids(split))
            keep = self.section.precision_recall and len(ids) <= self.section.samples
            real = self.features(self._real(ids), f"real images, {split}", keep=keep)
            if real.rows is not None:
                self._seen[f"{self._identity}-{split}"] = real.rows
            speaks_of_classes = collection.classes > 1 and real.logits.shape[1] == collection.classes
            accuracy = metrics.class_accuracy(real.logits, real.labels) if speaks_of_classes else None
            facts = {"count": real.moments.count, "accuracy": accuracy}
            return {"mean": real.moments.mean, "scatter": real.moments.scatter}, facts

        tensors, facts, _ = derived(collection, f"statistics-{self._identity}-{split}", make)
        return Reference(Moments(facts["count"], tensors["mean"], tensors["scatter"]), facts["accuracy"])

    def reference_features(self, split: str, count: int) -> Tensor:
        """[min(count, size), D]: features of the images of `spread`, kept beside the collection."""
        ids = spread(self.collection, split, count)

        def make() -> tuple[Tensors, dict[str, int]]:
            rows = self._seen.get(f"{self._identity}-{split}")
            if rows is None or len(rows) != len(ids):
                rows = self.features(self._real(ids), f"{len(ids)} real images, {split}", keep=True).rows
            assert rows is not None
            return {"features": rows}, {}

        tensors, _, _ = derived(self.collection, f"features-{self._identity}-{split}-{len(ids)}", make)
        return tensors["features"]

    def _real(self, ids: np.ndarray) -> Real:
        return Real(self.collection, ids, self.data)

    @property
    def _identity(self) -> str:
        extractor = self.extractor
        return f"{extractor.name}-{extractor.digest[:8]}-{extractor.resize}-{extractor.precision}"


@contextmanager
def open_evaluator(
    section: EvaluateSection, collection: Collection, data: DataSection, judge_seed: int
) -> Iterator[Evaluator]:
    """What a section describes. `judge_seed` chooses the classifier where that is the extractor.

    Raises UsageError, EnvironmentFault.
    """
    load = partial(load_extractor, section, collection, data, judge_seed)
    here = "cuda" if section.gpus and section.workers == 1 and torch.cuda.is_available() else "cpu"
    extractor = load(here)  # first, so that it trains the classifier which the workers load
    workers = Workers(section.workers, load, section.cpus, section.gpus) if section.workers > 1 else None
    try:
        yield Evaluator(section, collection, data, extractor, workers)
    finally:
        if workers:
            workers.stop()


def load_extractor(
    section: EvaluateSection, collection: Collection, data: DataSection, judge_seed: int, device: str = "cpu"
) -> Extractor:
    """The extractor that a section names. Raises UsageError, EnvironmentFault."""
    if device != "cpu":  # TF32's ten bits of mantissa move scores
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if section.extractor == "classifier":
        return classifier(collection, data, judge_seed, device)
    if section.extractor_is_file:
        return extractors.from_file(section.extractor, collection.resolution, device)
    return extractors.pretrained(
        section.extractor,
        section.weights,
        resize=section.resize,
        precision=section.precision,
        download=section.download,
        device=device,
    )


def spread(collection: Collection, split: str, count: int) -> np.ndarray:
    """Ids of min(count, size) samples spread evenly over a split."""
    ids = np.asarray(collection.ids(split))
    return ids[np.arange(min(count, len(ids))) * len(ids) // min(count, len(ids))]
