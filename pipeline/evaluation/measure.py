"""From a model to its score: samples, features, metrics."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.data.index import Collection
from pipeline.errors import UsageError
from pipeline.evaluation import metrics
from pipeline.evaluation.evaluator import Evaluator, Reference, open_evaluator
from pipeline.evaluation.features import Features, Generated
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.statistics import frechet_distance
from sagan.sampling import Model

# An extractor's logits speak of the collection's classes if they name most of its real images.
SPEAKS_OF_CLASSES = 0.5


@dataclass(frozen=True)
class Score:
    """What was measured, how, and which of it ranks. `values` is empty for a model that makes no finite images."""

    protocol: Protocol
    values: dict[str, float]
    """By short name: fid or fd_…, isc…, class_accuracy, precision, recall, kid…"""
    key: str
    """Short name of the value that ranks."""
    deviations: dict[str, float] = field(default_factory=dict)
    """Standard deviation of each value over the protocol's repeats, where there are several."""

    @property
    def value(self) -> float | None:
        return self.values.get(self.key)

    @property
    def higher_is_better(self) -> bool:
        return metrics.higher_is_better(self.key)

    def summary(self) -> dict[str, Any]:
        deviation = {"deviation": self.deviations[self.key]} if self.key in self.deviations else {}
        protocol = {"id": self.protocol.id8, **self.protocol.to_dict()}
        return {"key": self.key, "value": self.value, **deviation, "protocol": protocol}


def score_model(
    model: Model,
    section: EvaluateSection,
    collection: Collection,
    *,
    data: DataSection,
    seed: int,
    samples: int,
    judge_seed: int,
) -> Score:
    """The score of `samples` images of a model under a section's extractor and reference.

    Sample i is made of row i of the streams (seed, sample), so neither batch nor machine has a say in it. `judge_seed`
    chooses the classifier where that is the extractor. Raises UsageError, EnvironmentFault.
    """
    if model.config.size != collection.resolution:
        raise UsageError(
            f"the model makes {model.config.size} px images, {collection.url} holds {collection.resolution} px ones",
            "compare it with a collection of its own resolution",
        )
    with open_evaluator(section, collection, data, judge_seed) as evaluator:
        return measure(
            model, evaluator, evaluator.protocol((model.weights, model.batch_norm), seed=seed, samples=samples)
        )


def measure(model: Model, evaluator: Evaluator, protocol: Protocol) -> Score:
    """The score of a model under a protocol of the evaluator's. Raises UsageError, EnvironmentFault."""
    key = evaluator.ranking()
    if not is_finite(model):
        return Score(protocol, {}, key)
    repeats = [
        _measure_once(model, evaluator, protocol.seed, range(first, first + protocol.samples))
        for first in range(0, protocol.repeats * protocol.samples, protocol.samples)
    ]
    if key not in repeats[0]:
        raise UsageError(
            f"evaluate.score is {key}, but {evaluator.extractor.name} does not know the classes of "
            f"{evaluator.collection.url}",
            f"choose one of: {', '.join(repeats[0])}",
        )
    values = {name: statistics.mean(values[name] for values in repeats) for name in (key, *repeats[0])}
    spread = {name: statistics.stdev(v[name] for v in repeats) for name in values} if len(repeats) > 1 else {}
    return Score(protocol, values, key, spread)


def _measure_once(model: Model, evaluator: Evaluator, seed: int, samples: range) -> dict[str, float]:
    """Every metric, by short name, of these samples."""
    keep = evaluator.section.precision_recall
    made = evaluator.features(Generated(model, seed, samples), "samples", keep=keep)
    return compared(made, evaluator, speaks=speaks_of(model, evaluator.reference(evaluator.section.split)))


def compared(made: Features, evaluator: Evaluator, *, speaks: bool) -> dict[str, float]:
    """Every metric, by short name, of features beside those of the real images.

    class_accuracy where the logits are known to speak of the asked classes; kid, precision and recall where the rows
    were kept.
    """
    split, metric = evaluator.section.split, evaluator.extractor.metric
    values = {metric("fd"): frechet_distance(made.moments, evaluator.reference(split).moments)}
    if evaluator.extractor.has_logits:
        values[metric("isc")] = metrics.inception_score(made.logits)
    if speaks:
        values["class_accuracy"] = metrics.class_accuracy(made.logits, made.labels)
    if made.rows is not None:
        others = evaluator.reference_features(split, len(made.rows))
        values[metric("kid")] = metrics.kernel_distance(made.rows, others)
        values["precision"], values["recall"] = metrics.precision_recall(made.rows, others)
    return values


def speaks_of(model: Model, real: Reference) -> bool:
    """Whether the extractor's logits say if the model made what it was asked for."""
    return bool(model.config.labels) and real.accuracy is not None and real.accuracy > SPEAKS_OF_CLASSES


def is_finite(model: Model) -> bool:
    """Whether weights and standing statistics, thus all that a forward pass meets on the way, are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in model.generator.state_dict().values())
