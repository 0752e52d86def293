"""What a model's samples show: interpolations, the nearest real images, the classes that it makes worst and best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.data.index import Collection
from pipeline.data.stream import read_images
from pipeline.evaluation import metrics
from pipeline.evaluation.evaluator import open_evaluator, spread
from pipeline.evaluation.features import Generated
from pipeline.evaluation.measure import speaks_of
from pipeline.evaluation.statistics import Moments
from sagan.batch_norm import ConditionalBatchNorm
from sagan.generator import Generator
from sagan.random import Purpose, labels, latents
from sagan.sampling import Model

NEIGHBOURS = 4
_CHUNK = 1024  # rows whose distances are in memory together
LEAST_PER_CLASS = 10  # generated and real images of a class, below which its figures would be noise


@dataclass(frozen=True)
class Row:
    """Images that belong together, uint8 [n, 3, H, W], what they are, and what is said of each of them."""

    title: str
    images: Tensor
    captions: Sequence[str]


# --- interpolation ---------------------------------------------------------------------------------------------------


def between_latents(model: Model, rows: int, steps: int, seed: int) -> list[Row]:
    """From one latent to another on the sphere, the class held; row i is of the i-th class in turn."""
    z = latents(seed, Purpose.SAMPLE_Z, range(2 * rows), model.config.z_dim)
    asked = model.labels(None, rows)
    found = []
    for row in range(rows):
        y = None if asked is None else asked[row].expand(steps)
        images = model.generate(spherical(z[2 * row], z[2 * row + 1], steps), y).cpu()
        name = "" if asked is None else class_name(model, int(asked[row]))
        found.append(Row(name, images, [f"{name} {share}".strip() for share in _shares(steps)]))
    return found


def between_classes(model: Model, rows: int, steps: int, seed: int) -> list[Row]:
    """From one class to the next on a straight line between their tables, the latent held; [] without classes."""
    classes = model.config.labels
    found = []
    for row in range(min(rows, classes - 1)):
        z = latents(seed, Purpose.SAMPLE_Z, range(row, row + 1), model.config.z_dim).expand(steps, -1)
        images = blended(model, row, row + 1, steps).generate(z, torch.arange(steps)).cpu()
        title = f"{class_name(model, row)} → {class_name(model, row + 1)}"
        found.append(Row(title, images, [f"{title} {share}" for share in _shares(steps)]))
    return found


def spherical(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """float32 [steps, z_dim] from a to b, both float32 [z_dim]: on the great arc between them, lengths in between.

    A straight line would pass through lengths that no latent has.
    """
    share = torch.linspace(0, 1, steps)[:, None]
    lengths = torch.lerp(a.norm(), b.norm(), share)
    a, b = a / a.norm(), b / b.norm()
    angle = torch.arccos((a @ b).clamp(-1, 1))
    return lengths * (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def blended(model: Model, a: int, b: int, steps: int) -> Model:
    """A model whose classes 0 … steps − 1 lead from class a to class b of `model`."""
    config = replace(model.config, classes=steps)
    tensors = dict(model.generator.state_dict())
    share = torch.linspace(0, 1, steps, device=model.device)[:, None]
    for name, layer in model.generator.named_modules():
        if isinstance(layer, ConditionalBatchNorm):
            for table in ("weight", "bias"):
                rows = tensors[f"{name}.{table}"]
                tensors[f"{name}.{table}"] = torch.lerp(rows[a], rows[b], share)
    generator = Generator(config, folded=True).to(model.device)
    generator.load_state_dict(tensors)
    return Model(config, generator, weights=model.weights, batch_norm=model.batch_norm)


# --- beside real images ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassFigures:
    """One class in numbers.

    Attributes:
        accuracy: share of its images that the extractor takes for it; None where the extractor knows other classes.
        distance: between the means of its generated and its real features.
        frechet: Fréchet distance between them; None where it would be noise (`metrics.least_images`).
    """

    index: int
    generated: int
    real: int
    accuracy: float | None
    distance: float
    frechet: float | None


@dataclass(frozen=True)
class Beside:
    """Samples beside the images that the model was trained on, in an extractor's features.

    Attributes:
        nearest: the generated images that lie nearest to a training image, each followed by those nearest to it.
        generated, heldout: median distance to the nearest training image, of generated images and of as many held-out
            ones (None without that split): copies would be far nearer than images that were never seen.
        training_images: among how many was searched.
        features: how many the extractor has.
        classes: worst first; [] where there are too few images of each.
    """

    extractor: str
    nearest: list[Row]
    generated: float
    heldout: float | None
    training_images: int
    features: int
    classes: list[ClassFigures]


def beside_real(
    model: Model, collection: Collection, data: DataSection, section: EvaluateSection, samples: int, rows: int
) -> Beside:
    """`samples` generated beside as many images of `data.split`, under the extractor of `section`.

    Raises UsageError, EnvironmentFault, CorruptError.
    """
    heldout = None
    with open_evaluator(section, collection, data, section.seed) as evaluator:
        made = evaluator.features(Generated(model, section.seed, range(samples)), "samples", keep=True)
        features, logits, asked = made.rows, made.logits, made.labels
        assert features is not None
        ids = spread(collection, data.split, samples)
        real = evaluator.reference_features(data.split, samples)
        distances = to_nearest(features, real)
        if "heldout" in collection.splits and data.split != "heldout":
            heldout = to_nearest(evaluator.reference_features("heldout", samples), real).median().item()
        speaks, extractor = speaks_of(model, evaluator.reference(section.split)), evaluator.extractor
    classes = []
    if model.config.labels:
        real_labels = torch.from_numpy(collection.labels[ids])
        classes = by_class(features, logits if speaks else None, asked, real, real_labels)
    return Beside(
        extractor=extractor.name,
        nearest=[
            _nearest(model, collection, data, section, sample, torch.cdist(features[sample : sample + 1], real)[0], ids)
            for sample in distances.argsort()[:rows].tolist()
        ],
        generated=distances.median().item(),
        heldout=heldout,
        training_images=len(real),
        features=real.shape[1],
        classes=classes,
    )


def by_class(
    features: Tensor, logits: Tensor | None, asked: Tensor, real: Tensor, real_labels: Tensor
) -> list[ClassFigures]:
    """Figures of every class with at least 10 images on both sides, worst first: by accuracy, then by distance.

    features [N, D], logits [N, K] and labels int64 [N] of generated images; features [M, D] and labels of real ones.
    """
    found = []
    for index in real_labels.unique().tolist():
        mine, theirs = asked == index, real_labels == index
        if min(int(mine.sum()), int(theirs.sum())) < LEAST_PER_CLASS:
            continue
        accuracy = None if logits is None else (logits[mine].argmax(1) == index).double().mean().item()
        ours, others = features[mine], real[theirs]
        distance = mean_distance(Moments.of(ours), Moments.of(others))
        frechet = metrics.class_distance(ours, others)
        found.append(ClassFigures(index, len(ours), len(others), accuracy, distance, frechet))
    return sorted(found, key=lambda figures: (figures.accuracy or 0.0, -figures.distance))


def mean_distance(a: Moments, b: Moments) -> float:
    """|m₁ − m₂|, less what means of so few rows differ by chance: an unbiased estimate of its square, not below 0."""
    chance = a.covariance.trace() / a.count + b.covariance.trace() / b.count
    return float(((a.mean - b.mean).square().sum() - chance).clamp(min=0).sqrt())


def to_nearest(features: Tensor, real: Tensor) -> Tensor:
    """float32 [N]: Euclidean distance of each row of features [N, D] to the nearest row of real [M, D]."""
    return torch.cat([torch.cdist(part, real).amin(1) for part in features.split(_CHUNK)])


def _nearest(
    model: Model,
    collection: Collection,
    data: DataSection,
    section: EvaluateSection,
    sample: int,
    distances: Tensor,
    ids: np.ndarray,
) -> Row:
    """Sample number `sample` of a score, then the real images nearest to it; `distances` are those to `ids`."""
    position, classes = range(sample, sample + 1), model.config.labels
    y = labels(section.seed, Purpose.SAMPLE_Y, position, max(classes, 1))
    generated = model.generate(latents(section.seed, Purpose.SAMPLE_Z, position, model.config.z_dim), y).cpu()
    values, places = distances.topk(min(NEIGHBOURS, len(ids)), largest=False)
    chosen = ids[places.numpy()]
    real = torch.cat(list(read_images(collection, chosen, data.cache, data.cache_gb, data.threads)))
    name = class_name(model, int(y)) if classes else ""
    their_names = [collection.class_names[label] if collection.classes else "" for label in collection.labels[chosen]]
    captions = [f"{n}, {v:.3g}".removeprefix(", ") for n, v in zip(their_names, values.tolist(), strict=True)]
    return Row(name, torch.cat([generated, real]), [f"generated {name}".strip(), *captions])


def names(model: Model, n: int) -> list[str]:
    """What the first n images of `model.sample` are: their classes, where there are any."""
    y = model.labels(None, n)
    return ["sample"] * n if y is None else [class_name(model, index) for index in y.tolist()]


def class_name(model: Model, index: int) -> str:
    return model.class_names[index] if model.class_names else str(index)


def _shares(steps: int) -> list[str]:
    return [f"{100 * step / (steps - 1):.0f} %" for step in range(steps)]
