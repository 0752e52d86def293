"""Where images come from: a folder of classes, a tar of such, or scikit-learn's handwritten digits.

A source lists its images first, cheaply, in an order that depends on nothing but their names, and reads any of them
later, so that packing can permute millions with bounded memory.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pipeline.errors import UsageError
from pipeline.storage import files

DIGITS = "digits"
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "heldout"}
_HOW = "give a folder with a folder of images per class, or a tar of such, or `digits`"


@dataclass(frozen=True)
class Source:
    """Images that can be read one by one, in any order and from several threads.

    keys: the images' names. labels: the class of each, an index into class_names (0 where there are no classes).
    splits: the name of each part and the indices of its images. kind: what it is, the same wherever it lies.
    """

    kind: str
    keys: list[str]
    labels: np.ndarray
    class_names: list[str]
    splits: dict[str, np.ndarray]
    read: Callable[[int], bytes]


def open_source(source: str | dict[str, str]) -> Source:
    """The source of a packing section; a mapping names the splits.

    Raises UsageError where it is missing, holds no images, or images beside class folders; EnvironmentFault.
    """
    if isinstance(source, str):
        return _digits() if source == DIGITS else _by_class(*_open(source), where=source)
    parts = {
        split: (_digits() if url == DIGITS else _by_class(*_open(url), where=url)) for split, url in source.items()
    }
    return _joined(parts)


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
    readers = [(part.read, i) for part in parts.values() for i in range(len(part.keys))]
    stops = np.cumsum([len(part.keys) for part in parts.values()])
    labels = [
        np.array([index[name] for name in part.class_names], dtype=np.int64)[part.labels]
        if class_names
        else part.labels
        for part in parts.values()
    ]
    return Source(
        kind=" + ".join(sorted({part.kind for part in parts.values()})),
        keys=[f"{split}: {key}" for split, part in parts.items() for key in part.keys],
        labels=np.concatenate(labels),
        class_names=class_names,
        splits={s: np.arange(stop - len(p.keys), stop) for (s, p), stop in zip(parts.items(), stops, strict=True)},
        read=lambda i: readers[i][0](readers[i][1]),
    )


def _open(url: str) -> tuple[list[str], Callable[[str], bytes]]:
    """All files of a folder or tar, by path, and how to read one."""
    if files.name(url).endswith((".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")):
        return _open_tar(url)
    paths = files.list_files(url)
    if not paths:
        if not files.exists(url):
            raise UsageError(f"{url} does not exist", _HOW)
        if not (files.is_local(url) and files.local_path(url).is_dir()):
            raise UsageError(f"{url} is neither a folder nor a tar", _HOW)
    return paths, lambda path: files.read_bytes(files.join(url, path))


def _open_tar(url: str) -> tuple[list[str], Callable[[str], bytes]]:
    copy = None
    if files.is_local(url):
        path = files.local_path(url)
    else:  # once through the network, and from then on at any offset
        copy = tempfile.NamedTemporaryFile(prefix="sagan-", suffix=".tar")  # noqa: SIM115
        path = Path(copy.name)
    try:
        if copy:
            files.download(url, path)
        with tarfile.open(path, "r:") as tar:
            members = {m.name.removeprefix("./"): (m.offset_data, m.size) for m in tar if m.isfile()}
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist", _HOW) from None
    except tarfile.ReadError as error:
        raise UsageError(f"{url} cannot be read as a plain tar: {error}", "decompress it first, or check it") from None

    def read(member: str, _alive: object = copy) -> bytes:  # the copy goes when nobody can read from it any more
        offset, size = members[member]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    return sorted(members), read


def _by_class(paths: Sequence[str], read: Callable[[str], bytes], where: str) -> Source:
    """Class = parent folder. A leading split folder is no class; several of them are the splits."""
    images = sorted(p for p in map(PurePosixPath, paths) if p.suffix.lower() in _IMAGES and not _hidden(p))
    if not images:
        raise UsageError(f"{where} holds no images ({len(paths)} files, none ending in .jpg, .png, …)", _HOW)
    folders = [None if p.parent.name in _SPLITS or p.parent == PurePosixPath() else p.parent.name for p in images]
    class_names = sorted({name for name in folders if name is not None})
    if class_names and None in folders:
        stray = images[folders.index(None)]
        raise UsageError(
            f"{where} has class folders ({class_names[0]}, …), but {stray} is in none", "move or delete it"
        )
    index: dict[str | None, int] = {name: i for i, name in enumerate(class_names)} | {None: 0}
    split_of = [next((part for part in p.parts[:-1] if part in _SPLITS), "train") for p in images]
    names = sorted(set(split_of))
    splits = {name: np.array([i for i, s in enumerate(split_of) if s == name]) for name in names}
    if len(splits) == 1:
        splits = {"train": np.arange(len(images))}
    keys = [str(p) for p in images]
    labels = np.array([index[name] for name in folders], dtype=np.int64)
    return Source("images in folders", keys, labels, class_names, splits, lambda i: read(keys[i]))


def _hidden(path: PurePosixPath) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


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
    )
