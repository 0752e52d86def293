"""Recognition of the layout of a source from its files.

A source first lists the names of its images, in an order that depends only on these names. It reads single images
later. So packing can permute millions of images with bounded memory.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from pipeline.errors import UsageError
from pipeline.packing.archives_and_folders import Tree, suffix
from pipeline.packing.classes_and_splits import class_order
from pipeline.packing.image_source import WHAT_TO_GIVE, LeftOut, Source, tally, with_local_copy
from pipeline.packing.layouts import published, tables
from pipeline.packing.layouts.cifar import cifar_archive
from pipeline.packing.layouts.class_folders import class_folders
from pipeline.packing.layouts.digits import DIGITS, digits
from pipeline.storage import files
from pipeline.storage.validate_json import printable

_FILES = {".tar", ".gz", ".tgz", ".parquet", *tables.SEPARATORS}


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
    path = url.partition("#")[0]
    if suffix(path) in _FILES and files.is_folder(path):
        raise UsageError(f"{path} is a folder and not a file", f"write {path}/ for the folder")
    try:
        if url == DIGITS:
            return digits()
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
    opened = next((source for layout in published.LAYOUTS if (source := layout(tree)) is not None), None)
    opened = opened or class_folders(tree)
    titles = published.titles(tree, opened.class_names)
    if opened.left_out is None:
        opened = replace(opened, left_out=tally(tree.left_out(opened.keys, opened.unused)))
    if tree.copies:
        opened = with_local_copy(opened, tree.cleanup)
    return replace(opened, titles=titles)


def _joined(parts: dict[str, Source]) -> Source:
    """Join several sources into one that has them as splits. Classes are matched by name."""
    if not parts:
        raise UsageError("the source is an empty mapping and names no split", WHAT_TO_GIVE)
    for split, part in parts.items():
        if len(part.splits) > 1:
            raise UsageError(
                f"the source of split {split!r} has splits of its own: {', '.join(part.splits)}",
                "give this source alone, without naming a split",
            )
    class_names = class_order(name for part in parts.values() for name in part.class_names)
    if class_names and (unlabelled := [split for split, part in parts.items() if not part.class_names]):
        raise UsageError(f"split {unlabelled[0]!r} has no class folders, but other splits have them", WHAT_TO_GIVE)
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
