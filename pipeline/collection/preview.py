"""A picture of a collection that shows some images of each class, so that a person can find wrong labels early."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from pipeline.collection.image_codec import decode_into
from pipeline.collection.manifest import Collection
from pipeline.compute.threads import map_ahead
from pipeline.image_grid import LEAST_TILE, grid
from pipeline.storage import files

_ROWS, _COLUMNS = 20, 8
_NAME_LENGTH = 28  # a longer class name is cut


def preview(collection: Collection) -> Image.Image:
    """Draw at most eight images of each class, one class per row.

    They are the first images of the split `train`, or of the first split where there is no `train`. Where there are
    more than 20 classes, 20 evenly chosen ones are shown. Without classes the first 64 images are shown. An image that
    cannot be decoded is red. Raises EnvironmentFault.
    """
    split = "train" if "train" in collection.splits else next(iter(collection.splits))
    ids = collection.ids(split)
    labels = collection.labels[ids.start : ids.stop]
    present = np.unique(labels)
    shown = present[np.unique(np.linspace(0, len(present) - 1, _ROWS).round().astype(int))]
    most = _COLUMNS if collection.class_names else _COLUMNS * _COLUMNS
    chosen = [ids.start + np.flatnonzero(labels == label)[:most] for label in shown]
    tiles = list(map_ahead(lambda i: _tile(collection, int(i)), np.concatenate(chosen), 8, 16))
    blank = np.full_like(tiles[0], 255)
    rows, names, per_row = [], None, _COLUMNS
    if collection.class_names:  # white tiles fill the row of a class that has fewer images
        tile, per_row = iter(tiles), max(map(len, chosen))
        for of_class in chosen:
            rows += [next(tile) for _ in of_class] + [blank] * (per_row - len(of_class))
        names = [_short(collection.class_names[label]) for label in shown for _ in range(per_row)]
    title = f"{files.name(collection.url)} · {split} · {len(labels):,} images of {collection.resolution} px"
    if len(shown) < len(collection.class_names):
        title += f" · {len(shown)} of {len(collection.class_names):,} classes"
    images = torch.from_numpy(np.stack(rows or tiles)).permute(0, 3, 1, 2)
    return grid(images, names, per_row, title)


def _tile(collection: Collection, i: int) -> np.ndarray:
    """Return a stored image as uint8 [side, side, 3], at most as large as a tile of the grid."""
    pixels = np.empty((collection.resolution, collection.resolution, 3), dtype=np.uint8)
    start = int(collection.offset[i])
    url = collection.shard_url(collection.shards[collection.shard[i]])
    try:
        decode_into(files.read_bytes(url, start, start + int(collection.length[i])), pixels)
    except ValueError:
        pixels[:] = (200, 0, 0)
    side = min(LEAST_TILE, collection.resolution)
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


def _short(name: str) -> str:
    """Return a class name, cut to _NAME_LENGTH letters."""
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
