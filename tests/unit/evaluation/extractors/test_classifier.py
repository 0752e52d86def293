from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection
from pipeline.errors import UsageError
from pipeline.evaluation.extractors.classifier import classifier, train
from pipeline.storage import file_sets, files
from pipeline.streaming.read_images import read_images


def test_the_classifier_recognises_unseen_digits_and_is_trained_once(digits: Collection, data: DataSection) -> None:
    first = classifier(digits, data, seed=0)
    ids = np.asarray(digits.ids("heldout"))
    images = torch.cat(list(read_images(digits, ids, data.cache, data.cache_gb, data.threads)))
    features, logits = first(images)
    assert features.shape == (360, 64)
    assert float((logits.argmax(1).numpy() == digits.labels[ids]).mean()) >= 0.97

    stored = files.list_names(files.join(digits.url, "evaluation"))
    (folder,) = [name for name in stored if name.startswith("classifier") and "seed0" in name]
    manifest = file_sets.verify_set(files.join(digits.url, "evaluation", folder))
    ((name, entry),) = manifest.files.items()
    assert name.endswith(".safetensors")
    again = classifier(digits, data, seed=0)
    assert again.digest == first.digest == entry.sha256
    torch.testing.assert_close(again(images)[0], features, rtol=0, atol=0)


@pytest.mark.parametrize("resolution", [32, 256])
def test_training_depends_on_images_and_seed_alone(resolution: int) -> None:
    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1)
        while True:
            size = (8, 3, resolution, resolution)
            yield torch.randint(0, 256, size, generator=generator).byte(), torch.arange(8) % 3

    torch.manual_seed(1234)
    first = train(batches(), resolution, 3, steps=2, seed=5)
    torch.manual_seed(99)
    second, other = train(batches(), resolution, 3, steps=2, seed=5), train(batches(), resolution, 3, steps=2, seed=6)
    for (name, a), b, c in zip(
        first.state_dict().items(), second.state_dict().values(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert not name.endswith("weight") or not torch.equal(b, c), name
    assert first(next(batches())[0])[0].shape == (8, 64)


def test_without_classes_the_alternatives_are_named(digits: Collection, data: DataSection) -> None:
    with pytest.raises(UsageError, match="no classes") as caught:
        classifier(replace(digits, class_names=[]), data, seed=0)
    assert "inception" in caught.value.remedy
