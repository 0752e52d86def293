"""Analyses of a model's samples: interpolations, nearest real images, and figures of each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.evaluation import metrics
from pipeline.evaluation.features import Generated
from pipeline.evaluation.frechet_distance import Moments
from pipeline.evaluation.scorer import open_scorer
from pipeline.streaming.read_images import read_images
from sagan.batch_norm import ConditionalBatchNorm
from sagan.generator import Generator
from sagan.random import Purpose, draw_labels, draw_latents
from sagan.trained_model import Model

NEIGHBOURS = 4  # real images beside each generated image
_CHUNK = 1024  # rows whose distances are in memory at once
LEAST_PER_CLASS = 10  # least number of generated and of real images of a class; with fewer, its figures are noise


@dataclass(frozen=True)
class Row:
    """A titled row of images, uint8 [n, 3, H, W], with a caption for each image."""

    title: str
    images: Tensor
    captions: Sequence[str]


# --- interpolation ---------------------------------------------------------------------------------------------------


def between_latents(model: Model, rows: int, steps: int, seed: int) -> list[Row]:
    """Generate interpolations from one latent to another on the sphere, with the class fixed.

    Rows use the classes in turn.
    """
    z = draw_latents(seed, Purpose.SAMPLE_Z, range(2 * rows), model.config.z_dim)
    labels = model.labels_for(None, rows)
    result = []
    for row in range(rows):
        y = None if labels is None else labels[row].expand(steps)
        images = model.generate(spherical(z[2 * row], z[2 * row + 1], steps), y).cpu()
        name = "" if labels is None else class_name(model, int(labels[row]))
        result.append(Row(name, images, [f"{name} {share}".strip() for share in _shares(steps)]))
    return result


def between_classes(model: Model, rows: int, steps: int, seed: int) -> list[Row]:
    """Generate interpolations from one class to the next, with the latent fixed; [] without classes.

    The parameters of conditional batch norm move on a straight line from one class to the next.
    """
    classes = model.config.known_num_classes
    result = []
    for row in range(min(rows, classes - 1)):
        z = draw_latents(seed, Purpose.SAMPLE_Z, range(row, row + 1), model.config.z_dim).expand(steps, -1)
        images = blended(model, row, row + 1, steps).generate(z, torch.arange(steps)).cpu()
        title = f"{class_name(model, row)} → {class_name(model, row + 1)}"
        result.append(Row(title, images, [f"{title} {share}" for share in _shares(steps)]))
    return result


def spherical(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Return points from latent a to latent b, both float32 [z_dim], as float32 [steps, z_dim].

    Directions move along the great arc. Lengths move linearly from |a| to |b|. A straight line from a to b would pass
    through lengths that no latent has.
    """
    share = torch.linspace(0, 1, steps)[:, None]
    lengths = torch.lerp(a.norm(), b.norm(), share)
    a, b = a / a.norm(), b / b.norm()
    angle = torch.arccos((a @ b).clamp(-1, 1))
    return lengths * (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def blended(model: Model, a: int, b: int, steps: int) -> Model:
    """Return a model with classes 0 … steps − 1 that move from class a to class b of `model`."""
    config = replace(model.config, num_classes=steps)
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
    """Figures of one class.

    Attributes:
        index: Index of the class.
        generated: Number of generated images.
        real: Number of real images.
        accuracy: Share of the generated images that the extractor assigns to the class, in [0, 1]; None where the
            extractor knows other classes.
        distance: Distance between the means of the generated and the real features (`mean_distance`).
        frechet: Fréchet distance between the generated and the real features; None where it would be noise
            (`metrics.least_images_per_class`).
    """

    index: int
    generated: int
    real: int
    accuracy: float | None
    distance: float
    frechet: float | None


@dataclass(frozen=True)
class RealComparison:
    """Comparison of samples with the images that the model was trained on, in the features of an extractor.

    Copies of training images would be far nearer to training images than held-out images are. So compare `generated`
    with `heldout`.

    Attributes:
        extractor: Name of the extractor.
        nearest: Rows for the generated images that are nearest to a training image. Each row has a generated image and
            the training images that are nearest to it.
        generated: Median distance of the generated images to the nearest training image.
        heldout: Median distance of as many held-out images to the nearest training image; None without that split.
        training_images: Number of training images.
        features: Number of features of the extractor.
        classes: Figures of the classes, the worst first; [] where every class has too few images.
    """

    extractor: str
    nearest: list[Row]
    generated: float
    heldout: float | None
    training_images: int
    features: int
    classes: list[ClassFigures]


def compare_with_real(
    model: Model, collection: Collection, data: DataSection, section: EvaluateSection, samples: int, rows: int
) -> RealComparison:
    """Compare generated images with as many images of `data.split`, in the features of the extractor of `section`.

    Args:
        model: The model.
        collection: Collection that the model was trained on.
        data: Its `split` names the training images.
        section: Extractor and seed.
        samples: Number of generated images.
        rows: Number of rows in `nearest`.

    Raises UsageError, EnvironmentFault, CorruptError.
    """
    heldout = None
    with open_scorer(section, collection, data, section.seed) as scorer:
        generated = scorer.features(Generated(model, section.seed, range(samples)), "samples", keep=True)
        features, logits, labels = generated.rows, generated.logits, generated.labels
        assert features is not None
        ids = collection.evenly_spaced_ids(data.split, samples)
        real = scorer.reference_features(data.split, samples)
        distances = to_nearest(features, real)
        if "heldout" in collection.splits and data.split != "heldout":
            heldout = to_nearest(scorer.reference_features("heldout", samples), real).median().item()
        classes_match, extractor = scorer.classes_match(model), scorer.extractor
    classes = []
    if model.config.known_num_classes:
        real_labels = torch.from_numpy(collection.labels[ids])
        classes = by_class(features, logits if classes_match else None, labels, real, real_labels)
    return RealComparison(
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
    features: Tensor, logits: Tensor | None, labels: Tensor, real: Tensor, real_labels: Tensor
) -> list[ClassFigures]:
    """Return the figures of every class with at least 10 generated and 10 real images.

    The worst class comes first. Classes are sorted by accuracy, then by distance.

    Args:
        features: Features of generated images [N, D].
        logits: Logits of generated images [N, K]; None where the extractor knows other classes.
        labels: Labels of generated images, int64 [N].
        real: Features of real images [M, D].
        real_labels: Labels of real images, int64 [M].
    """
    result = []
    for index in real_labels.unique().tolist():
        in_generated, in_real = labels == index, real_labels == index
        if min(int(in_generated.sum()), int(in_real.sum())) < LEAST_PER_CLASS:
            continue
        accuracy = None if logits is None else (logits[in_generated].argmax(1) == index).double().mean().item()
        of_generated, of_real = features[in_generated], real[in_real]
        distance = mean_distance(Moments.of(of_generated), Moments.of(of_real))
        frechet = metrics.class_distance(of_generated, of_real)
        result.append(ClassFigures(index, len(of_generated), len(of_real), accuracy, distance, frechet))
    return sorted(result, key=lambda figures: (figures.accuracy or 0.0, -figures.distance))


def mean_distance(a: Moments, b: Moments) -> float:
    """Return the distance |m₁ − m₂| between two means, corrected for the number of rows.

    Means of few rows differ by chance. The function subtracts this part from the square of the distance. So the square
    is an unbiased estimate, except that a negative square is set to 0.
    """
    chance = a.covariance.trace() / a.count + b.covariance.trace() / b.count
    return float(((a.mean - b.mean).square().sum() - chance).clamp(min=0).sqrt())


def to_nearest(features: Tensor, real: Tensor) -> Tensor:
    """Return the Euclidean distance of each row of features [N, D] to the nearest row of real [M, D], float32 [N]."""
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
    """Return a row of sample number `sample` and the real images nearest to it.

    `distances` has the distance of the sample to each of the real images `ids`.
    """
    position, classes = range(sample, sample + 1), model.config.known_num_classes
    y = draw_labels(section.seed, Purpose.SAMPLE_Y, position, max(classes, 1))
    generated = model.generate(draw_latents(section.seed, Purpose.SAMPLE_Z, position, model.config.z_dim), y).cpu()
    values, indices = distances.topk(min(NEIGHBOURS, len(ids)), largest=False)
    nearest = ids[indices.numpy()]
    real = torch.cat(list(read_images(collection, nearest, data.cache, data.cache_gb, data.threads)))
    name = class_name(model, int(y)) if classes else ""
    real_names = [
        collection.class_names[label] if collection.num_classes else "" for label in collection.labels[nearest]
    ]
    captions = [f"{n}, {v:.3g}".removeprefix(", ") for n, v in zip(real_names, values.tolist(), strict=True)]
    return Row(name, torch.cat([generated, real]), [f"generated {name}".strip(), *captions])


def names(model: Model, n: int) -> list[str]:
    """Return a name for each of the first n images of `model.sample`: its class, or "sample" without classes."""
    y = model.labels_for(None, n)
    return ["sample"] * n if y is None else [class_name(model, index) for index in y.tolist()]


def class_name(model: Model, index: int) -> str:
    """Return the name of a class, or its index where classes have no names."""
    return model.class_names[index] if model.class_names else str(index)


def _shares(steps: int) -> list[str]:
    """Return `steps` percentages from 0 % to 100 % as text."""
    return [f"{100 * step / (steps - 1):.0f} %" for step in range(steps)]
