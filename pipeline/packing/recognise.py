"""Recognition of the layout of a source from its files.

A source first lists the names of its images, in an order that depends only on these names. It reads single images
later. So packing can permute millions of images with bounded memory.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from pipeline.errors import UsageError
from pipeline.packing import published_layouts, tables
from pipeline.packing.archives_and_folders import IMAGES, Tree, folders_of, ignored, suffix
from pipeline.packing.cifar import cifar_archive
from pipeline.packing.image_source import LeftOut, Row, Source, source_of, tally, with_local_copy
from pipeline.packing.labels_and_splits import class_order, split_named, splits_of_folders
from pipeline.storage import files
from pipeline.storage.stored_json import printable

DIGITS = "digits"
_HOW = (
    "give a folder with a folder of images per class, a tar of such a folder, a published data set in its own layout, "
    "WebDataset shards, Parquet files with images, a table of path,label, or `digits`"
)


def open_source(source: str | dict[str, str]) -> Source:
    """Open the source of a packing section: one path or URL, or a mapping from split to path or URL.

    Raises UsageError where the source is missing, holds no images, or holds images beside class folders. Raises
    EnvironmentFault where storage fails.
    """
    opened = _open(source) if isinstance(source, str) else _joined({split: _open(url) for split, url in source.items()})
    names = [opened.titles.get(name, name) for name in opened.class_names]
    twice = {name for name, count in Counter(names).items() if count > 1}  # two classes of ImageNet are called crane
    names = [f"{n} ({c})" if n in twice else n for n, c in zip(names, opened.class_names, strict=True)]
    names = [printable(name) for name in names]
    if equal := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"two classes have the same name: {equal[0]}", "rename one of them")
    return replace(opened, class_names=names)


def _open(url: str) -> Source:
    """Open the source at one path or URL."""
    try:
        if url == DIGITS:
            return _digits()
        if tables.is_table(url):
            return tables.read(url)
        if suffix(url) in (".gz", ".tgz"):
            return cifar_archive(url)
        return _in_tree(Tree.open(url))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, FileNotFoundError) as error:
        # A list in the source, such as the classes of ImageNet, has another form than its publisher gave it.
        raise UsageError(f"{url}: a list of images or classes cannot be read: {error!r}", "get the original") from error


def _in_tree(tree: Tree) -> Source:
    """Recognise the layout of a tree of files."""
    opened = next((source for layout in published_layouts.LAYOUTS if (source := layout(tree)) is not None), None)
    opened = opened or _by_class(tree)
    titles = published_layouts.titles(tree, opened.class_names)
    if opened.left_out is None:
        opened = replace(opened, left_out=tally(tree.left_out(opened.keys, opened.unused)))
    if tree.copies:
        opened = with_local_copy(opened, tree.cleanup)
    return replace(opened, titles=titles)


def _joined(parts: dict[str, Source]) -> Source:
    """Join several sources into one that has them as splits. Classes are matched by name."""
    if not parts:
        raise UsageError("the source is an empty mapping and names no split", _HOW)
    for split, part in parts.items():
        if len(part.splits) > 1:
            raise UsageError(
                f"the source of split {split!r} has splits of its own: {', '.join(part.splits)}",
                "give this source alone, without naming a split",
            )
    class_names = class_order(name for part in parts.values() for name in part.class_names)
    if class_names and (unlabelled := [split for split, part in parts.items() if not part.class_names]):
        raise UsageError(f"split {unlabelled[0]!r} has no class folders, but other splits have them", _HOW)
    index = {name: i for i, name in enumerate(class_names)}
    stops = np.cumsum([len(part.keys) for part in parts.values()])
    labels = [
        np.array([index[name] for name in part.class_names], dtype=np.int64)[part.labels]
        if class_names
        else part.labels
        for part in parts.values()
    ]
    readers = [part.read for part in parts.values()]

    def read(i: int) -> bytes:
        part = int(np.searchsorted(stops, i, side="right"))
        return readers[part](i - int(stops[part - 1]) if part else i)

    return Source(
        kind=" + ".join(sorted({part.kind for part in parts.values()})),
        keys=[f"{split}: {key}" for split, part in parts.items() for key in part.keys],
        labels=np.concatenate(labels),
        class_names=class_names,
        splits={s: np.arange(stop - len(p.keys), stop) for (s, p), stop in zip(parts.items(), stops, strict=True)},
        read=read,
        titles={name: title for part in parts.values() for name, title in part.titles.items()},
        notes=[f"{split}: {note}" for split, part in parts.items() for note in part.notes],
        left_out=_added([part.left_out or {} for part in parts.values()]),
        local_only=any(part.local_only for part in parts.values()),
    )


def _added(parts: list[LeftOut]) -> LeftOut:
    """Return the files that are left out of all parts of a source."""
    total: LeftOut = {}
    for part in parts:
        for group, (count, first) in part.items():
            before, example = total.get(group, (0, first))
            total[group] = (before + count, example)
    return total


def _by_class(tree: Tree) -> Source:
    """Read images whose class is their parent folder.

    Folders that are all named train, val, test, … are splits and not classes.
    """
    images = tree.images
    if not images:
        raise UsageError(f"{tree.url} holds no images ({len(tree.places)} files, none ends in .jpg, .png, …)", _HOW)
    level = -1
    if all(folders_of(path)[-1:] == ["images"] for path in images):
        level = -2  # each class folder has a folder `images`, which is not a class
    rows = []
    for path, split, within in _splits_of(images):
        label = within[level] if len(within) >= -level else None
        rows.append(Row(path, tree.places[path], label, split))
    notes = _folders_without_images(tree, {row.label for row in rows})
    return source_of("images in folders", rows, notes=notes, labels_are_names=True)


def _splits_of(paths: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """Return the split of each path, and the names of the folders that may be its class.

    Splits are the folders of the first level at which every path has a folder of a split (`splits_of_folders`). The
    folders below are classes. Where there are none, the folders above are. Raises UsageError.
    """
    folders = [folders_of(path) for path in paths]
    for level in range(min(map(len, folders))):
        split_of = splits_of_folders({parts[level] for parts in folders})
        if split_of is not None:
            differ = len({tuple(parts[:level]) for parts in folders}) > 1
            classes = [parts[level + 1 :] or (parts[:level] if differ else []) for parts in folders]
            splits = [split_of[parts[level]] for parts in folders]
            return list(zip(paths, splits, classes, strict=True))
    return [(path, "train", parts) for path, parts in zip(paths, folders, strict=True)]


def _folders_without_images(tree: Tree, classes: set[object]) -> list[str]:
    """Return a note about folders that have no images, although they look like classes."""
    others = [folders_of(path) for path in tree.places if suffix(path) not in IMAGES and ignored(path) is None]
    names = {parts[-1] for parts in others if parts} | _empty_folders(tree)
    empty = sorted(name for name in names if name not in classes and split_named(name) is None)
    if not empty:
        return []
    more = f" and {len(empty) - 5:,} more" if len(empty) > 5 else ""
    return [f"folders without images are not classes: {', '.join(empty[:5])}{more}"]


def _empty_folders(tree: Tree) -> set[str]:
    """Return the names of empty folders beside class folders. Buckets and tars have no empty folders."""
    if not (files.is_local(tree.url) and files.local_path(tree.url).is_dir()):
        return set()
    root = files.local_path(tree.url)
    above = {(root / path).parent.parent for path in tree.images if "/" in path}
    folders = [path for folder in above if folder.is_dir() for path in folder.iterdir() if path.is_dir()]
    return {path.name for path in folders if ignored(path.name) is None and not any(path.iterdir())}


def _digits() -> Source:
    """Read scikit-learn's 1 797 handwritten digits, 8 x 8 grey: 1 437 in train and 360 in heldout, drawn at random.

    The draw is not stratified. Generated images are compared with held-out images, and their classes are drawn at
    random too.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    train, heldout = train_test_split(np.arange(len(labels)), test_size=360, random_state=0)

    def read(i: int) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels[i]).save(out, "PNG")
        return out.getvalue()

    return Source(
        kind="scikit-learn digits",
        keys=[f"{label}/{i:04d}" for i, label in enumerate(labels)],
        labels=labels,
        class_names=[str(digit) for digit in range(10)],
        splits={"train": np.sort(train), "heldout": np.sort(heldout)},
        read=read,
        left_out={},
        local_only=True,  # packing the digits here takes less time than asking a cluster
    )
