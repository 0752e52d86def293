"""Loads the extractor that a job names."""

from __future__ import annotations

from pipeline.collection.manifest import Collection
from pipeline.compute.torch_settings import disable_tf32
from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.evaluation.extractors.classifier import classifier
from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.evaluation.extractors.extractor_file import extractor_from_file
from pipeline.evaluation.extractors.published_weights import load_published


def load_extractor(
    section: EvaluateSection, collection: Collection, data: DataSection, classifier_seed: int, device: str = "cpu"
) -> Extractor:
    """Load the extractor of a section: a published network, a file, or the classifier of the collection and the seed.

    Args:
        section: The section `evaluate` of a job.
        collection: The collection. Its resolution is the input size of a file, and the classifier is trained on it.
        data: Shard cache and number of decoding threads for the classifier's training.
        classifier_seed: Seed of the classifier.
        device: Device of the extractor. TF32 is switched off in this process unless the device is "cpu".

    Raises UsageError, EnvironmentFault, CorruptError.
    """
    if device != "cpu":  # TF32 has ten bits of mantissa, which changes scores
        disable_tf32()
    if section.extractor == "classifier":
        return classifier(collection, data, classifier_seed, device)
    if section.extractor_is_file:
        return extractor_from_file(
            section.extractor,
            collection.resolution,
            device,
            sha256=section.extractor_sha256,
            trusted=section.trust_extractor,
        )
    return load_published(
        section.extractor,
        section.extractor_weights,
        resize=section.resize,
        dtype=section.extractor_dtype,
        download=section.download,
        device=device,
    )
