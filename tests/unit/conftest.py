from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.collection.manifest import Collection
from pipeline.config.schema import PackSection
from pipeline.packing.pack import pack


def quiet(done: int, total: int | None) -> None:
    """A progress report that says nothing."""


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes with 30, 20 and 10 images of noise, 32 x 32, no two alike."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for name, count in {"ant": 30, "bee": 20, "cow": 10}.items():
        (folder / name).mkdir()
        for i in range(count):
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def packed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """`images` in 9 shards of up to 7. Read only: take `copied` to damage one."""
    destination = tmp_path_factory.mktemp("packed") / "set"
    return pack(str(destination), PackSection(source=str(images), resolution=32, shard_images=7), quiet)


@pytest.fixture
def copied(packed: Collection, tmp_path: Path) -> Path:
    """The folder of a copy of `packed`."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for file in Path(packed.url).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def class_of(images: Path) -> Callable[[np.ndarray], str]:
    """The class of an image, uint8 [H, W, 3], known by its pixels."""
    known = {np.asarray(Image.open(path)).tobytes(): path.parent.name for path in images.rglob("*.png")}
    return lambda pixels: known[np.ascontiguousarray(pixels).tobytes()]
