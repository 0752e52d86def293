"""A source of images: their names, classes and splits, and a function that reads each image."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from pipeline.errors import UsageError
from pipeline.packing.archives_and_folders import Place, suffix
from pipeline.packing.classes_and_splits import class_names_of, class_order
from pipeline.storage import files
from pipeline.storage.validate_json import printable

LeftOut = dict[tuple[str, str], tuple[int, str]]
"""Number of files that are left out, and the first of them, by reason and suffix."""

WHAT_TO_GIVE = (
    "give a folder with a folder of images per class, a tar of such a folder, a published data set in its own layout, "
    "WebDataset shards, Parquet files with images, a table of path,label, or `digits`"
)
"""The remedy for a path that is not a source of images."""


@dataclass(frozen=True)
class Source:
    """n images that can be read one by one, in any order and from several threads.

    Attributes:
        kind: Name of the layout. It does not depend on where the source lies.
        keys: Names of the images.
        labels: int64 [n], class of each image as an index into `class_names`; 0 where there are no classes.
        class_names: Names of the classes as the source has them; empty where there are no classes.
        splits: Indices of the images of each split, by its name.
        read: Returns the bytes of the image with an index. Raises ValueError where it is too large, FileNotFoundError,
            EnvironmentFault. It can be pickled unless `local_only` is true.
        titles: Readable name of a class, by its name in `class_names`, where it is known.
        notes: What to print about the source.
        unused: Reason why an image that the layout lists is left out, by its name.
        left_out: All files of the source that are left out. None: `keys` are paths, and the other files are left out.
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
    unused: dict[str, str] = field(default_factory=dict)
    left_out: LeftOut | None = None
    local_only: bool = False


class Row(NamedTuple):
    """One image of a source.

    Attributes:
        key: Name of the image.
        place: Where its bytes are.
        label: Its label as the source has it (see `class_names_of`); None where it has none.
        split: Name of its split.
    """

    key: str
    place: Place
    label: object
    split: str


def source_of(
    kind: str,
    rows: Iterable[Row],
    class_names: Sequence[str] | None = None,
    notes: Iterable[str] = (),
    local_only: bool = False,
    labels_are_names: bool = False,
) -> Source:
    """Build a source from its images, sorted by key. A single split is named train.

    A split whose images all have no label is left out where other splits have labels.

    Args:
        kind: Name of the layout.
        rows: The images.
        class_names: Names of the classes by number, where the source has such a list.
        notes: What to print about the source.
        local_only: Whether only this machine can read the images. Images on its disk always count as local.
        labels_are_names: Labels are names of folders or tars. They are words, also where they are digits.

    Raises UsageError where a label is wrong, or where some images of a split have a label and others have none.
    """
    rows, notes = sorted(rows, key=lambda row: row.key), list(notes)
    if labels_are_names:
        names = [None if row.label is None else str(row.label) for row in rows]
        class_names = class_order(name for name in names if name is not None)
    else:
        names, class_names = class_names_of([(row.key, row.label) for row in rows], class_names)
    unlabelled = {row.split for row in rows} - {row.split for row, name in zip(rows, names, strict=True) if name}
    unused: dict[str, str] = {}
    if any(names) and unlabelled:
        unused = {row.key: f"no labels in split {row.split}" for row in rows if row.split in unlabelled}
        notes += [f"split {split} has no labels and is left out" for split in sorted(unlabelled)]
        kept = [i for i, row in enumerate(rows) if row.split not in unlabelled]
        rows, names = [rows[i] for i in kept], [names[i] for i in kept]
    if any(names) and None in names:
        stray, example = rows[names.index(None)].key, next(filter(None, names))
        raise UsageError(
            f"some images have a class ({printable(example)}, …), but {printable(stray)} has none", "move or delete it"
        )
    index: dict[str | None, int] = {name: i for i, name in enumerate(class_names)} | {None: 0}
    splits = sorted({row.split for row in rows})
    ids = {split: np.array([i for i, row in enumerate(rows) if row.split == split]) for split in splits}
    return Source(
        kind,
        keys=[row.key for row in rows],
        labels=np.array([index[name] for name in names], dtype=np.int64),
        class_names=class_names if any(names) else [],
        splits=ids if len(ids) > 1 else {"train": np.arange(len(rows))},
        read=partial(_read, [row.place for row in rows]),
        notes=notes,
        unused=unused,
        local_only=local_only or any(files.is_local(row.place.url) for row in rows[:1]),
    )


def tally(reasons: Mapping[str, str]) -> LeftOut:
    """Count files by reason and suffix.

    Args:
        reasons: Reason why a file is left out, by its path.
    """
    counts: LeftOut = {}
    for path in sorted(reasons):
        count, first = counts.get((reasons[path], suffix(path)), (0, path))
        counts[reasons[path], suffix(path)] = (count + 1, first)
    return counts


def with_local_copy(source: Source, cleanup: ExitStack) -> Source:
    """Return a source that reads a local copy. The copy is deleted together with the source's function `read`."""

    def read(i: int) -> bytes:
        return source.read(i)

    weakref.finalize(read, cleanup.pop_all().close)
    return replace(source, read=read, local_only=True)


def _read(places: list[Place], i: int) -> bytes:
    return places[i].read()
