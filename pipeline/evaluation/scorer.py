"""Scores models: compares features of generated images with features of real images under one extractor."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from pipeline.collection.derived_tensors import NoFacts, Tensors, derived
from pipeline.collection.manifest import Collection
from pipeline.compute.actor_pool import ActorPool
from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.errors import CorruptError, SaganError, UsageError
from pipeline.evaluation import metrics
from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.evaluation.extractors.load_extractor import load_extractor
from pipeline.evaluation.features import Features, Generated, ImageSet, Real, chunks_of, extract, feature_actors
from pipeline.evaluation.frechet_distance import Moments
from pipeline.evaluation.metrics import Images, Metric
from pipeline.progress import progress
from pipeline.runs.score_protocol import Score, ScoreProtocol
from sagan.trained_model import Model

CLASSES_MATCH = 0.5
"""The extractor's classes count as the collection's where it recognises more than this share of the real images."""

_MOST = 1e100
"""Features of type float32 have at most 3.4e38, so sums of their squares are far below this number."""


@dataclass(frozen=True)
class Reference:
    """Moments of a split's features under an extractor. Samples are compared with them."""

    moments: Moments
    accuracy: float | None
    """Share of the real images whose class the extractor recognises. None where the numbers of classes differ."""


class _StoredFacts(BaseModel):
    """Facts of stored statistics."""

    accuracy: float | None = Field(ge=0, le=1)


@dataclass(frozen=True)
class Scorer:
    """Scores models against a collection under one extractor. `open_scorer` creates it."""

    section: EvaluateSection
    collection: Collection
    data: DataSection
    extractor: Extractor
    actors: ActorPool | None
    """Processes that compute features. None: this process computes them."""
    _kept: dict[str, Tensor] = field(default_factory=dict)
    """Features of all images of a split, [n, D], by the name of extractor and split."""

    # --- scores ---

    def protocol(self, model: Model, *, seed: int, samples: int, repeats: int = 1) -> ScoreProtocol:
        """Return the protocol of a score of `repeats` ranges of `samples` images from the streams of `seed`."""
        return self.protocol_of(model.weights, model.batch_norm, seed=seed, samples=samples, repeats=repeats)

    def protocol_of(self, weights: str, batch_norm: str, *, seed: int, samples: int, repeats: int = 1) -> ScoreProtocol:
        """Return the protocol for a model of which only `Model.weights` and `Model.batch_norm` are known."""
        return ScoreProtocol(
            extractor=self.extractor.name,
            extractor_digest=self.extractor.digest,
            resize=self.extractor.resize,
            extractor_dtype=self.extractor.dtype,
            reference_digest=self.collection.digest,
            split=self.section.split,
            samples=samples,
            seed=seed,
            weights=weights,
            batch_norm=batch_norm,
            repeats=repeats,
        )

    def score(self, model: Model, protocol: ScoreProtocol) -> Score:
        """Score a model under a protocol of this scorer.

        Sample i is generated from row i of the streams (seed, sample). It does not depend on batches or machines. The
        score of a model with non-finite parameters has no values. Raises SaganError where a metric is not finite,
        UsageError, EnvironmentFault.
        """
        ranking = self.ranking_metric()
        self.require_enough_images(protocol.samples)
        metric, higher_is_better = ranking.name_under(self.extractor), ranking.higher_is_better
        if not is_finite(model):
            return Score.of(protocol, metric, higher_is_better, {})
        repeats = [
            self._metrics_of_samples(model, protocol.seed, range(first, first + protocol.samples))
            for first in range(0, protocol.repeats * protocol.samples, protocol.samples)
        ]
        if metric not in repeats[0]:
            raise UsageError(
                f"evaluate.score is {metric}, but {self.extractor.name} does not know the classes of "
                f"{self.collection.url}, or the model generates others",
                f"choose one of: {', '.join(repeats[0])}",
            )
        if infinite := [name for values in repeats for name, value in values.items() if not math.isfinite(value)]:
            raise SaganError(
                f"{infinite[0]} is not finite: features or logits of {self.extractor.name} overflow",
                f"test the extractor: sagan evaluate --self-test --reference {self.collection.url}",
            )
        values = {name: statistics.mean(values[name] for values in repeats) for name in repeats[0]}
        deviations = {n: statistics.stdev(v[n] for v in repeats) for n in values} if len(repeats) > 1 else {}
        return Score.of(protocol, metric, higher_is_better, values, deviations)

    def ranking_metric(self) -> Metric:
        """Return the metric that `evaluate.score` names. Raises UsageError where it is not computed."""
        available, score = self._available(), self.section.score
        if score == "auto":
            return metrics.FRECHET_DISTANCE
        names = {metric.name_under(self.extractor): metric for metric in available}
        if score not in names:
            features = ", ".join(m.name for m in metrics.METRICS if m.needs == "features")
            hint = "" if self.section.feature_metrics else f" ({features} need evaluate.feature_metrics: true)"
            raise UsageError(
                f"evaluate.score is {score!r}, which is not computed with extractor {self.extractor.name}",
                f"choose auto or one of: {', '.join(names)}{hint}",
            )
        return names[score]

    def require_enough_images(self, samples: int) -> None:
        """Raise UsageError where a metric needs more than `samples` generated images, or more real images."""
        split = self.section.split
        for metric in self._available():
            name, least = metric.name_under(self.extractor), metric.least_images
            if self.collection.size(split) < least:
                raise UsageError(
                    f"{name} needs at least {least} real images, but split {split!r} of {self.collection.url} has "
                    f"{self.collection.size(split)}",
                    "set evaluate.split to a larger split, or pack a larger collection",
                )
            if samples < least:
                raise UsageError(
                    f"{name} needs at least {least} generated images, but there are {samples}",
                    f"set evaluate.samples and evaluate.final_samples to {least} or more",
                )

    def compute_metrics(self, generated: Features, *, classes_match: bool) -> dict[str, float]:
        """Compute every metric of generated features against the features of the real images. Return them by name.

        `classes_match` states whether the logits belong to the requested classes.
        """
        split = self.section.split
        images = Images(
            generated=generated.moments,
            real=self.reference(split).moments,
            logits=generated.logits,
            labels=generated.labels,
            generated_features=generated.rows,
            real_features=None if generated.rows is None else self.reference_features(split, len(generated.rows)),
        )
        return {
            metric.name_under(self.extractor): metric.compute(images)
            for metric in self._available()
            if classes_match or metric.needs != "class labels"
        }

    def classes_match(self, model: Model) -> bool:
        """Return whether the extractor recognises the collection's classes, and the model generates these classes."""
        accuracy, names = self.reference(self.section.split).accuracy, self.collection.class_names
        same_number = model.config.known_num_classes == self.collection.num_classes
        same_names = not (model.class_names and names) or model.class_names == list(names)
        return same_number and same_names and accuracy is not None and accuracy > CLASSES_MATCH

    def _metrics_of_samples(self, model: Model, seed: int, samples: range) -> dict[str, float]:
        generated = self.features(Generated(model, seed, samples), "samples", keep=self.section.feature_metrics)
        return self.compute_metrics(generated, classes_match=self.classes_match(model))

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics of a score. A score may lack the accuracy of the classes (see `classes_match`)."""
        return [metric.name_under(self.extractor) for metric in self._available()]

    def _available(self) -> list[Metric]:
        """Return the metrics that this extractor and section allow."""
        needs = {"moments"}
        if self.extractor.has_logits:
            needs |= {"logits", "class labels"}
        if self.section.feature_metrics:
            needs |= {"features"}
        return [metric for metric in metrics.METRICS if metric.needs in needs]

    # --- features ---

    def features(self, images: ImageSet, what: str, *, keep: bool = False) -> Features:
        """Compute the features of all images.

        Args:
            images: The images.
            what: What the progress bar calls them.
            keep: Whether the result keeps the features as `rows`.

        Raises NotFinite, EnvironmentFault, CorruptError.
        """
        parts, batch = chunks_of(len(images)), self.section.batch
        with progress(what, len(images)) as advance:
            if self.actors is None:
                chunks = [extract(self.extractor, images, p, batch=batch, keep=keep, advance=advance) for p in parts]
            else:
                chunks = []
                for chunk in self.actors.map("extract", images, parts, batch=batch, keep=keep):
                    advance(len(chunk.labels))
                    chunks.append(chunk)
        return Features.merged(chunks)

    def reference(self, split: str) -> Reference:
        """Return the reference of all images of a split. It is computed once and stored beside the collection."""
        collection = self.collection

        def make() -> tuple[Tensors, dict[str, float | int | None]]:
            ids = np.asarray(collection.ids(split))
            keep = self.section.feature_metrics and len(ids) <= self.section.samples
            real = self.features(self._real(ids), f"real images, {split}", keep=keep)
            if real.rows is not None:
                self._kept[f"{self._identity}-{split}"] = real.rows
            same_number = collection.num_classes > 1 and real.logits.shape[1] == collection.num_classes
            accuracy = metrics.class_accuracy(real.logits, real.labels) if same_number else None
            facts = {"count": real.moments.count, "accuracy": accuracy}
            return {"mean": real.moments.mean, "scatter": real.moments.scatter}, facts

        size = self._dimensions
        expected = {
            name: torch.empty(shape, dtype=torch.float64, device="meta")
            for name, shape in (("mean", (size,)), ("scatter", (size, size)))
        }
        tensors, facts, _ = derived(collection, f"statistics-{self._identity}-{split}", make, expected, _StoredFacts)
        self._require_finite(tensors, split)
        moments = Moments(collection.size(split), tensors["mean"], tensors["scatter"])
        return Reference(moments, facts.accuracy)

    def reference_features(self, split: str, count: int) -> Tensor:
        """Return the features of evenly spaced images of a split, [min(count, size of the split), D].

        They are computed once and stored beside the collection.
        """
        ids = self.collection.evenly_spaced_ids(split, count)

        def make() -> tuple[Tensors, dict[str, int]]:
            rows = self._kept.get(f"{self._identity}-{split}")
            if rows is None or len(rows) != len(ids):
                rows = self.features(self._real(ids), f"{len(ids)} real images, {split}", keep=True).rows
            assert rows is not None
            return {"features": rows}, {}

        shape, dtype = (len(ids), self._dimensions), getattr(torch, self.extractor.dtype)
        expected = {"features": torch.empty(shape, dtype=dtype, device="meta")}
        name = f"features-{self._identity}-{split}-{len(ids)}"
        tensors, _, _ = derived(self.collection, name, make, expected, NoFacts)
        self._require_finite(tensors, split)
        return tensors["features"]

    @cached_property
    def _dimensions(self) -> int:
        """Number of features of an image."""
        side = self.collection.resolution
        features, _ = self.extractor(torch.zeros((1, 3, side, side), dtype=torch.uint8))
        return features.shape[1]

    def _require_finite(self, tensors: Tensors, split: str) -> None:
        """Raise CorruptError where results of real images are not finite, or too large for the metrics."""
        if not all(bool((tensor.abs() < _MOST).all()) for tensor in tensors.values()):
            raise CorruptError(
                f"features of the split {split} of {self.collection.url} under {self.extractor.name} are not finite, "
                f"or their stored form in {self.collection.url}/evaluation is damaged",
                "delete that folder and test the extractor: sagan evaluate --self-test",
            )

    def _real(self, ids: np.ndarray) -> Real:
        return Real(self.collection, ids, self.data)

    @property
    def _identity(self) -> str:
        """Part of the name of everything that is computed from real images under this extractor."""
        extractor = self.extractor
        return f"{extractor.name}-{extractor.digest[:8]}-{extractor.resize}-{extractor.dtype}"


@contextmanager
def open_scorer(
    section: EvaluateSection, collection: Collection, data: DataSection, classifier_seed: int
) -> Iterator[Scorer]:
    """Open the scorer that a section describes.

    Where `evaluate.workers` is above 1, actors on the connected Ray cluster compute features.

    Args:
        section: The section `evaluate` of a job.
        collection: The collection that models are compared with.
        data: Shard cache and number of decoding threads.
        classifier_seed: Seed of the classifier, where the classifier is the extractor.

    Raises UsageError, EnvironmentFault.
    """
    load = partial(load_extractor, section, collection, data, classifier_seed)
    device = "cuda" if section.gpus and section.workers == 1 and torch.cuda.is_available() else "cpu"
    extractor = load(device)  # before the actors start, so that a classifier is trained once
    actors = feature_actors(section, load) if section.workers > 1 else None
    try:
        yield Scorer(section, collection, data, extractor, actors)
    finally:
        if actors is not None:
            actors.stop()


def is_finite(model: Model) -> bool:
    """Return whether all parameters and batch-norm statistics are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in model.generator.state_dict().values())
