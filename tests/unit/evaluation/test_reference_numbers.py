"""Our extractors, moments and distances against numbers computed once, independently, on real CIFAR-10 images."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from pipeline.evaluation.extractors.extractor_file import extractor_from_file
from pipeline.evaluation.frechet_distance import Moments, frechet_distance
from pipeline.evaluation.metrics import class_accuracy, class_distance, inception_score

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TOLERANCE = 1e-3  # stated with the numbers

Features = tuple[torch.Tensor, torch.Tensor]


class Measured:
    """Features and logits of every set under one network, computed when first asked for."""

    def __init__(self, folder: Path, network: str) -> None:
        self.folder = folder
        self.extractor = extractor_from_file(str(folder / f"{network}-cifar10.ts"), 32, trusted=True)
        self.numbers: dict[str, Any] = json.loads((folder / "cifar10-reference-numbers.json").read_text())[network]

    @functools.lru_cache  # noqa: B019
    def of(self, name: str) -> Features:
        parts = [self.extractor(part) for part in self._images(name).split(250)]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def distance(self, a: torch.Tensor, b: torch.Tensor) -> float:
        return frechet_distance(Moments.of(a), Moments.of(b))

    def labels(self, name: str) -> torch.Tensor:
        return torch.tensor([CLASSES.index(label) for label, _ in self._members(name)])

    def _members(self, name: str) -> Iterator[tuple[str, Image.Image]]:
        archive = {"train": "cifar10-train-5000.tar", "test": "cifar10-test-1017.tar"}[name]
        with tarfile.open(self.folder / archive) as tar:
            for member in tar:
                if member.isfile():
                    file = tar.extractfile(member)
                    assert file is not None
                    yield member.name.split("/")[1], Image.open(io.BytesIO(file.read())).convert("RGB")

    def _images(self, name: str) -> torch.Tensor:
        if name == "noise":
            generator = torch.Generator().manual_seed(0)
            return torch.randint(0, 256, (1017, 3, 32, 32), dtype=torch.uint8, generator=generator)
        kind, _, change = name.partition(" ")
        images = (_changed(image, change) for _, image in self._members(kind))
        return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def _changed(image: Image.Image, change: str) -> Image.Image:
    if change == "blur":
        return image.filter(ImageFilter.GaussianBlur(1))
    if change == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=50)
        return Image.open(file).convert("RGB")
    return image


@pytest.fixture(scope="module")
def resnet20(test_data: Path | None) -> Measured:
    return Measured(_needed(test_data), "resnet20")


@pytest.fixture(scope="module")
def resnet56(test_data: Path | None) -> Measured:
    return Measured(_needed(test_data), "resnet56")


def _needed(folder: Path | None) -> Path:
    if folder is None:
        pytest.skip("real images are in the folder that SAGAN_TEST_DATA names")
    return folder


def check_test_set(measured: Measured) -> None:
    """What needs the 1 017 test images alone."""
    _, logits = measured.of("test")
    top1 = 100 * class_accuracy(logits, measured.labels("test"))
    assert top1 == pytest.approx(measured.numbers["top1_test_percent"], abs=0.1)
    expected = measured.numbers["inception_style_score"]["test1017"]
    assert inception_score(logits, splits=1) == pytest.approx(expected, rel=TOLERANCE)


def check_training_set(measured: Measured) -> None:
    """What needs the 5 000 training images, and all the ways to spoil the test images."""
    features, logits = measured.of("train")
    labels = measured.labels("train")
    sets = {
        "train5000_vs_test1017": measured.of("test")[0],
        "train5000_vs_test_gaussian_blur_radius_1": measured.of("test blur")[0],
        "train5000_vs_test_jpeg_q50": measured.of("test jpeg")[0],
        "train5000_vs_uniform_noise_1017": measured.of("noise")[0],
    }
    found = {name: measured.distance(features, other) for name, other in sets.items()}
    found["train_even_vs_odd"] = measured.distance(features[::2], features[1::2])
    found["train_class0_vs_class1"] = measured.distance(features[labels == 0], features[labels == 1])
    expected = dict(measured.numbers["frechet_64d"])
    assert measured.distance(features, features) == pytest.approx(expected.pop("train5000_vs_itself"), abs=1e-6)
    assert found == pytest.approx(expected, rel=TOLERANCE)
    assert 100 * class_accuracy(logits, labels) == pytest.approx(measured.numbers["top1_train_percent"], abs=0.05)
    scores = {name: inception_score(measured.of(name)[1], splits=1) for name in ("train", "test", "noise")}
    train, test, noise = measured.numbers["inception_style_score"].values()
    assert scores == pytest.approx({"train": train, "test": test, "noise": noise}, rel=TOLERANCE)


def test_resnet20_on_the_test_set(resnet20: Measured) -> None:
    check_test_set(resnet20)


def test_resnet20_on_the_training_set(resnet20: Measured) -> None:
    check_training_set(resnet20)


def test_the_distance_of_a_class_is_given_where_it_is_more_than_noise(resnet20: Measured) -> None:
    features, labels = resnet20.of("train")[0], resnet20.labels("train")
    for label in range(10):
        mine, other = features[labels == label], features[labels == (label + 1) % 10]
        variance = float(Moments.of(mine).covariance.trace())
        by_chance = class_distance(mine[0:256:2], mine[1:256:2])
        assert by_chance is not None
        assert by_chance < 0.2 * variance  # 0.07 to 0.12 where the bound was chosen
        between = class_distance(mine[:128], other[:128])
        assert between is not None
        assert between > 10 * by_chance
        assert class_distance(mine[:127], other) is None
        assert class_distance(mine, other[:127]) is None


def test_resnet56_on_the_test_set(resnet56: Measured) -> None:
    check_test_set(resnet56)


@pytest.mark.slow
def test_resnet56_on_the_training_set(resnet56: Measured) -> None:
    check_training_set(resnet56)
