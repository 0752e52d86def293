"""A source of images: their names, classes and splits, and a function that reads each image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from pipeline.errors import UsageError
from pipeline.packing.archives_and_folders import Place
from pipeline.storage import files


@dataclass(frozen=True)
class Source:
    """n images that can be read one by one, in any order and from several threads.

    Attributes:
        kind: Name of the layout. It does not depend on where the source lies.
        keys: Names of the images.
        labels: int64 [n], class of each image as an index into `class_names`; 0 where there are no classes.
        class_names: Names of the classes as the source has them; empty where there are no classes.
        splits: Indices of the images of each split, by its name.
        read: Returns the bytes of the image with an index. Raises FileNotFoundError, EnvironmentFault. It can be
            pickled unless `local_only` is true.
        titles: Readable name of a class, by its name in `class_names`, where it is known.
        notes: What to print about files that are not taken for images or classes.
        local_only: Whether only this machine can read the source.
    """

    kind: str
    keys: list[str]
    labels: np.ndarray
    class_names: list[str]
    splits: dict[str, np.ndarray]
    read: Callable[[int], bytes]
    titles: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    local_only: bool = False


class Row(NamedTuple):
    """One image of a source.

    Attributes:
        key: Name of the image.
        place: Where its bytes are.
        label: Name of its class; None where there are no classes.
        split: Name of its split.
    """

    key: str
    place: Place
    label: str | None
    split: str


def source_of(
    kind: str,
    rows: Iterable[Row],
    class_names: list[str] | None = None,
    notes: Iterable[str] = (),
    local_only: bool = False,
) -> Source:
    """Build a source from its images, sorted by key. A single split is named train.

    Args:
        kind: Name of the layout.
        rows: The images.
        class_names: Names of the classes in the order of their labels. Default: the classes of the images, sorted.
        notes: What to print about files that are not taken for images or classes.
        local_only: Whether only this machine can read the images. Images on its disk always count as local.

    Raises UsageError where some images have a class and others have none.
    """
    rows = sorted(rows, key=lambda row: row.key)
    classes = {row.label for row in rows}
    if None in classes and len(classes) > 1:
        stray = next(row.key for row in rows if row.label is None)
        example = min(label for label in classes if label is not None)
        raise UsageError(f"some images have a class ({example}, …), but {stray} has none", "move or delete it")
    if class_names is None or classes == {None}:
        class_names = sorted(label for label in classes if label is not None)
    index: dict[str | None, int] = {name: i for i, name in enumerate(class_names)} | {None: 0}
    names = sorted({row.split for row in rows})
    splits = {name: np.array([i for i, row in enumerate(rows) if row.split == name]) for name in names}
    return Source(
        kind,
        keys=[row.key for row in rows],
        labels=np.array([index[row.label] for row in rows], dtype=np.int64),
        class_names=class_names,
        splits=splits if len(splits) > 1 else {"train": np.arange(len(rows))},
        read=partial(_read, [row.place for row in rows]),
        notes=list(notes),
        local_only=local_only or any(files.is_local(row.place.url) for row in rows[:1]),
    )


def _read(places: list[Place], i: int) -> bytes:
    return places[i].read()
