"""Real images are packed, verified and read back."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.collection.verify import verify_collection
from pipeline.config.schema import DataSection, PackSection
from pipeline.packing.pack import pack
from pipeline.streaming.stream import Stream
from sagan.ranks import World
from tests.unit.packing.read_collection import bytes_of, read_back


@pytest.mark.parametrize(
    ("archive", "resolution", "per_class"),
    [
        ("cifar10-test-1017.tar", 32, [105, 93, 100, 104, 92, 87, 114, 102, 110, 110]),
        pytest.param("cifar10-train-5000.tar", 32, [500] * 10, marks=pytest.mark.slow),
        ("imagenette128-val-250.tar", 128, [25] * 10),
        pytest.param("imagenette128-train-1500.tar", 128, [150] * 10, marks=pytest.mark.slow),
    ],
)
def test_a_collection_packs_the_same_from_a_tar_and_a_folder(
    test_data: Path | None, tmp_path: Path, archive: str, resolution: int, per_class: list[int]
) -> None:
    """From the tar and unpacked: the same bytes, every pixel and every label right, read by webdataset."""
    if test_data is None:
        pytest.skip("SAGAN_TEST_DATA names no folder with real collections")
    with tarfile.open(test_data / archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    index = test_data / "imagenet_class_index.json"
    (tmp_path / index.name).write_bytes(index.read_bytes())  # beside the folder, as it stands beside the tar
    name_of = dict(json.loads(index.read_text()).values())
    section = PackSection(source=str(test_data / archive), resolution=resolution, encoding="png")
    collection = pack(f"{tmp_path}/packed", section)
    unpacked = pack(f"{tmp_path}/again", section.model_copy(update={"source": f"{tmp_path}/unpacked"}))
    assert bytes_of(unpacked.url) == bytes_of(collection.url)

    originals = (tmp_path / "unpacked").rglob("*.*")
    class_of = {
        np.asarray(Image.open(path).convert("RGB")).tobytes(): name_of.get(path.parent.name, path.parent.name)
        for path in originals
    }
    samples = read_back(collection, "train")
    assert len(samples) == sum(per_class)
    for sample in samples:
        assert collection.class_names[sample["cls"]] == class_of[sample["png"].tobytes()].replace("_", " ")
    assert np.bincount(collection.labels).tolist() == per_class


@pytest.mark.parametrize(
    ("archive", "resolution", "images", "classes"),
    [
        ("imagenet-originals-30.tar", 128, 30, 30),
        ("trashnet-24.tar", 256, 24, 6),
        ("imagenette128-val-250.tar", 64, 250, 10),
        pytest.param("cifar10-test-1017.tar", 32, 1017, 10, marks=pytest.mark.slow),
        pytest.param("cifar10-train-5000.tar", 32, 5000, 10, marks=pytest.mark.slow),
        pytest.param("imagenette128-train-1500.tar", 128, 1500, 10, marks=pytest.mark.slow),
    ],
)
def test_a_collection_is_verified_previewed_and_streamed(
    test_data: Path | None,
    tmp_path: Path,
    archive: str,
    resolution: int,
    images: int,
    classes: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if test_data is None:
        pytest.skip("SAGAN_TEST_DATA names no folder with real collections")
    collection = pack(f"{tmp_path}/set", PackSection(source=f"{test_data}/{archive}", resolution=resolution))
    printed = capsys.readouterr().out
    assert (collection.size("train"), collection.num_classes) == (images, classes)
    assert "warning" not in printed, "no two images are equal, and classes are even"
    assert len(Path(collection.url, "keys.txt").read_text().splitlines()) == images
    verify_collection(collection.url)
    with Image.open(f"{collection.url}/preview.png") as preview:
        assert preview.width > 200
    stream = Stream(
        collection, "train", seed=0, world=World(), data=DataSection(train=collection.url, cache=f"{tmp_path}/cache")
    )
    try:
        batch = next(stream.batches(0, images))
    finally:
        stream.close()
    assert batch.images.shape == (images, 3, resolution, resolution)
    assert len({image.numpy().tobytes() for image in batch.images}) == images
    assert np.bincount(batch.labels).tolist() == np.bincount(collection.labels).tolist()
