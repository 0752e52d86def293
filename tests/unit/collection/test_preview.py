from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.collection.manifest import Collection
from pipeline.collection.preview import preview


def test_the_preview_has_a_row_for_each_class_with_its_images(packed: Collection) -> None:
    picture = np.asarray(preview(packed))
    left = _first_tile_column(picture)
    first_tiles = {picture[top : top + 64, left : left + 64].tobytes() for top in range(len(picture) - 64)}
    for label in range(3):
        i = int(np.flatnonzero(packed.labels == label)[0])
        data = Path(packed.url, packed.shards[packed.shard[i]].name).read_bytes()[packed.offset[i] :][
            : packed.length[i]
        ]
        tile = Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.NEAREST)
        assert np.asarray(tile).tobytes() in first_tiles


def _first_tile_column(picture: np.ndarray) -> int:
    """Where the first column of tiles begins: the first column of pixels that is coloured."""
    coloured = (picture.max(axis=2).astype(int) - picture.min(axis=2)).max(axis=0) > 50
    return int(np.flatnonzero(coloured)[0])


def test_the_preview_stands_beside_the_shards(packed: Collection) -> None:
    with Image.open(f"{packed.url}/preview.png") as stored:
        np.testing.assert_array_equal(np.asarray(stored), np.asarray(preview(packed)))
