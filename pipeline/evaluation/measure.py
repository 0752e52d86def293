"""From a model to its score: samples, features, metrics."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.data.index import Collection
from pipeline.errors import UsageError
from pipeline.evaluation import extractors, metrics
from pipeline.evaluation.classifier import classifier
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.progress import shown
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.statistics import Moments, Reference, frechet_distance, reference, reference_features
from sagan.random import Purpose, labels, latents
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
    extractor = load_extractor(section, collection, data, judge_seed, str(model.device))
    kind = (model.weights, model.batch_norm)
    protocol = protocol_of(extractor, section, collection, kind, seed=seed, samples=samples)
    return measure(model, extractor, protocol, section, collection, data)


def load_extractor(
    section: EvaluateSection, collection: Collection, data: DataSection, judge_seed: int, device: str = "cpu"
) -> Extractor:
    """The extractor that a section names. Raises UsageError, EnvironmentFault."""
    if device != "cpu":  # TF32's ten bits of mantissa move scores
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if section.extractor == "classifier":
        return classifier(collection, data, judge_seed, device)
    if section.extractor == "inception":
        return extractors.inception(section.weights, device)
    return extractors.from_file(section.extractor, collection.resolution, device)


def protocol_of(
    extractor: Extractor,
    section: EvaluateSection,
    collection: Collection,
    kind: tuple[str, str],
    *,
    seed: int,
    samples: int,
    repeats: int = 1,
) -> Protocol:
    """`kind`: weights and batch-norm statistics of the model, as it names them."""
    weights, batch_norm = kind
    return Protocol(
        extractor=extractor.name,
        extractor_digest=extractor.digest,
        resize=extractor.resize,
        reference_digest=collection.digest,
        split=section.split,
        samples=samples,
        seed=seed,
        weights=weights,
        batch_norm=batch_norm,
        repeats=repeats,
    )


def metric_names(extractor: Extractor, section: EvaluateSection) -> list[str]:
    """Short names of what may be measured; the first is what `score: auto` means."""
    names = [extractor.metric("fd"), extractor.metric("isc"), "class_accuracy"]
    return [*names, extractor.metric("kid"), "precision", "recall"] if section.precision_recall else names


def ranking(extractor: Extractor, section: EvaluateSection) -> str:
    """Short name of the metric that ranks. Raises UsageError for one that is not measured."""
    names = metric_names(extractor, section)
    if section.score == "auto":
        return names[0]
    if section.score not in names:
        raise UsageError(
            f"evaluate.score is {section.score!r}, which extractor {extractor.name} does not give",
            f"choose auto or one of: {', '.join(names)}"
            + ("" if section.precision_recall else " (precision, recall, kid with evaluate.precision_recall: true)"),
        )
    return section.score


def measure(
    model: Model,
    extractor: Extractor,
    protocol: Protocol,
    section: EvaluateSection,
    collection: Collection,
    data: DataSection,
) -> Score:
    """`score_model` with an extractor that is loaded."""
    key = ranking(extractor, section)
    if not is_finite(model):
        return Score(protocol, {}, key)
    repeats = [
        _measure_once(model, extractor, protocol, section, collection, data, first)
        for first in range(0, protocol.repeats * protocol.samples, protocol.samples)
    ]
    if key not in repeats[0]:
        raise UsageError(
            f"evaluate.score is {key}, but {extractor.name} does not know the classes of {collection.url}",
            f"choose one of: {', '.join(repeats[0])}",
        )
    values = {name: statistics.mean(values[name] for values in repeats) for name in (key, *repeats[0])}
    spread = {name: statistics.stdev(v[name] for v in repeats) for name in values} if len(repeats) > 1 else {}
    return Score(protocol, values, key, spread)


def _measure_once(
    model: Model,
    extractor: Extractor,
    protocol: Protocol,
    section: EvaluateSection,
    collection: Collection,
    data: DataSection,
    first: int,
) -> dict[str, float]:
    """Every metric, by short name, of the samples from `first` on."""
    real = reference(collection, section.split, extractor, data, section.batch)
    moments, kept, logits, asked = None, [], [], []
    parts = sampled(model, extractor, protocol.seed, range(first, first + protocol.samples), section.batch)
    for features, part, y in shown(parts, protocol.samples, "samples"):
        moments = Moments.of(features) if moments is None else moments.merge(Moments.of(features))
        logits.append(part.cpu())
        asked.append(y)
        if section.precision_recall:
            kept.append(features.cpu())
    assert moments is not None
    values = {
        extractor.metric("fd"): frechet_distance(moments, real.moments),
        extractor.metric("isc"): metrics.inception_score(torch.cat(logits)),
    }
    if speaks_of(model, real):
        values["class_accuracy"] = metrics.class_accuracy(torch.cat(logits), torch.cat(asked))
    if section.precision_recall:
        others = reference_features(collection, section.split, extractor, data, section.batch, protocol.samples)
        generated = torch.cat(kept)
        values[extractor.metric("kid")] = metrics.kernel_distance(generated, others)
        values["precision"], values["recall"] = metrics.precision_recall(generated, others)
    return values


def speaks_of(model: Model, real: Reference) -> bool:
    """Whether the extractor's logits say if the model made what it was asked for."""
    return bool(model.config.labels) and real.accuracy is not None and real.accuracy > SPEAKS_OF_CLASSES


def is_finite(model: Model) -> bool:
    """Whether weights and standing statistics, thus all that a forward pass meets on the way, are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in model.generator.state_dict().values())


def sampled(
    model: Model, extractor: Extractor, seed: int, samples: range, batch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(features, logits, asked labels) of these samples, at most `batch` at a time."""
    classes = model.config.labels
    for start in range(0, len(samples), batch):
        positions = samples[start : start + batch]
        z = latents(seed, Purpose.SAMPLE_Z, positions, model.config.z_dim)
        y = labels(seed, Purpose.SAMPLE_Y, positions, max(classes, 1))
        yield *extractor(model.generate(z, y if classes else None)), y
