"""Where images come from: whatever lies at a path or URL is recognised by what is there.

A source lists its images first, cheaply, in an order that depends on nothing but their names, and reads any of them
later, so that packing can permute millions with bounded memory.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from pipeline.data import official, tables
from pipeline.data.tree import IMAGES, SPLITS, Row, Source, Tree, hidden, source_of, suffix
from pipeline.errors import UsageError
from pipeline.storage import files

DIGITS = "digits"
_HOW = (
    "give a folder with a folder of images per class, a tar of such, an official layout, WebDataset shards, Parquet "
    "with images, a table of path,label, or `digits`"
)
_UNKNOWN_IMAGES = {".heic", ".heif", ".raw", ".cr2", ".nef", ".dng", ".svg", ".psd", ".jxl", ".zip", ".mat", ".npy"}


def open_source(source: str | dict[str, str]) -> Source:
    """The source of a packing section; a mapping names the splits.

    Raises UsageError where it is missing, holds no images, or images beside class folders; EnvironmentFault.
    """
    found = _open(source) if isinstance(source, str) else _joined({split: _open(url) for split, url in source.items()})
    names = [found.titles.get(name, name) for name in found.class_names]
    twice = {name for name, count in Counter(names).items() if count > 1}  # two classes of ImageNet are called crane
    names = [f"{n} ({c})" if n in twice else n for n, c in zip(names, found.class_names, strict=True)]
    return replace(found, class_names=names)


def _open(url: str) -> Source:
    if url == DIGITS:
        return _digits()
    if tables.is_table(url):
        return tables.read(url)
    if suffix(url) in (".gz", ".tgz"):
        return official.cifar_archive(url)
    tree = Tree.open(url)
    found = next((source for layout in official.LAYOUTS if (source := layout(tree)) is not None), None)
    found = found or _by_class(tree)
    return replace(found, titles=official.titles(tree, found.class_names))


def _joined(parts: dict[str, Source]) -> Source:
    """Several sources as the splits of one, their classes matched by name."""
    if not parts:
        raise UsageError("the source names no split", _HOW)
    for split, part in parts.items():
        if len(part.splits) > 1:
            raise UsageError(
                f"the source of split {split!r} has splits of its own: {', '.join(part.splits)}",
                "give it as the source itself, without naming splits",
            )
    class_names = sorted({name for part in parts.values() for name in part.class_names})
    if class_names and (bare := [split for split, part in parts.items() if not part.class_names]):
        raise UsageError(f"split {bare[0]!r} has no class folders, other splits have", _HOW)
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
        here=any(part.here for part in parts.values()),
    )


def _by_class(tree: Tree) -> Source:
    """Class = parent folder. Folders that are all called after splits are no classes; several of them are splits."""
    images = tree.images
    if not images:
        expected = f"{len(tree.places)} files, none ending in .jpg, .png, …"
        raise UsageError(f"{tree.url} holds no images ({expected})", _HOW)
    depth = _split_depth(images)
    level = -1
    if all(PurePosixPath(path).parent.name == "images" for path in images):
        level = -2  # a folder that all classes have is none
    rows = []
    for path in images:
        folders = PurePosixPath(path).parts[:-1]
        split = "train" if depth is None else folders[depth]
        within = folders if depth is None else folders[depth + 1 :]
        rows.append(Row(path, tree.places[path], within[level] if len(within) >= -level else None, split))
    return source_of("images in folders", rows, notes=_left_out(tree, {row.label for row in rows}))


def _split_depth(paths: Sequence[str]) -> int | None:
    """The level at which every path goes through a folder that is called after a split."""
    folders = [PurePosixPath(path).parts[:-1] for path in paths]
    deepest = min(len(parts) for parts in folders)
    return next((d for d in range(deepest) if all(parts[d] in SPLITS for parts in folders)), None)


def _left_out(tree: Tree, classes: set[str | None]) -> list[str]:
    """What somebody may have taken for images, and folders that would have been classes."""
    others = [path for path in tree.places if suffix(path) not in IMAGES and not hidden(path)]
    unknown = Counter(suffix(path) for path in others if suffix(path) in _UNKNOWN_IMAGES)
    empty = ({PurePosixPath(path).parent.name for path in others} | _empty_folders(tree)) - classes - SPLITS - {""}
    notes = [f"{count:,} {kind} files are of a kind that is not read" for kind, count in sorted(unknown.items())]
    if empty:
        more = f" and {len(empty) - 5:,} more" if len(empty) > 5 else ""
        notes.append(f"folders without any image are no classes: {', '.join(sorted(empty)[:5])}{more}")
    return notes


def _empty_folders(tree: Tree) -> set[str]:
    """Names of the folders without any file beside class folders; only a file system has such."""
    if not (files.is_local(tree.url) and files.local_path(tree.url).is_dir()):
        return set()
    root = files.local_path(tree.url)
    above = {(root / path).parent.parent for path in tree.images if "/" in path}
    folders = [path for folder in above if folder.is_dir() for path in folder.iterdir() if path.is_dir()]
    return {path.name for path in folders if not hidden(path.name) and not any(path.iterdir())}


def _digits() -> Source:
    """1 797 handwritten digits, 8 x 8 grey; train 1 437 and heldout 360, drawn at random.

    Not stratified: samples are compared with held-out images, and their classes are drawn at random too.
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
        here=True,  # sooner packed than a cluster is asked
    )
