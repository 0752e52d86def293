"""Layouts of published data sets. Each function returns None where a tree of files does not have its layout."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import tarfile
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from webdataset.tariterators import base_plus_ext

from pipeline.collection.shard_file import label_of
from pipeline.errors import UsageError
from pipeline.packing import tables
from pipeline.packing.archives_and_folders import IMAGES, Place, Tree, hidden, split_in, suffix
from pipeline.packing.image_source import Row, Source, source_of
from pipeline.storage import files

_WNID = re.compile(r"n\d{8}")
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_LSUN = re.compile(r"[0-9a-f]{40}\.(webp|jpg|png)")


def imagenet(tree: Tree) -> Source | None:
    """Read ILSVRC2012: flat validation images with their ground truth, and optionally the training images.

    Training images lie in a tar of tars or in class folders. Raises UsageError where the ground truth is missing.
    """
    flat = {
        path: match
        for path in tree.images
        if (match := _VALIDATION.fullmatch(PurePosixPath(path).name)) and not _WNID.fullmatch(_folder(path))
    }
    if not flat:
        return None
    truth, mapping = tree.text("ILSVRC2012_validation_ground_truth.txt"), tree.text("imagenet_map_clsloc.txt")
    if truth and mapping:
        wnid_of = {number: wnid for wnid, number, *_ in map(str.split, mapping.splitlines())}
        ids = truth.split()  # ILSVRC's own class numbers; they do not follow the order of the WordNet ids
        labels = {path: wnid_of[ids[int(match[1]) - 1]] for path, match in flat.items()}
    elif solution := tree.text("LOC_val_solution.csv"):  # Kaggle's ground truth
        wnids = {
            name: boxes.split()[0] for name, boxes in (line.split(",") for line in solution.split("\n")[1:] if line)
        }
        labels = {path: wnids[PurePosixPath(path).stem] for path in flat}
    else:
        raise UsageError(
            f"{tree.url} holds validation images of ImageNet, whose classes are unknown without their ground truth",
            "put ILSVRC2012_validation_ground_truth.txt and imagenet_map_clsloc.txt into the folder or beside it",
        )
    rows = [Row(path, tree.places[path], label, "val") for path, label in labels.items()]
    train = [path for path in tree.images if _WNID.fullmatch(_folder(path))]
    return source_of("ImageNet", rows + [Row(path, tree.places[path], _folder(path), "train") for path in train])


def tiny_imagenet(tree: Tree) -> Source | None:
    """Read Tiny ImageNet: train/<WordNet id>/images/*.JPEG, and val/images/*.JPEG with val_annotations.txt.

    Test images have no labels and are left out.
    """
    table = next((path for path in tree.places if path.endswith("val/val_annotations.txt")), None)
    if table is None:
        return None
    root = table.removesuffix("val/val_annotations.txt")
    label_by_name = dict(line.split("\t")[:2] for line in tree.read(table).decode().splitlines())
    rows, unlabelled = [], 0
    for path in tree.images:
        split, *folders, name = path.removeprefix(root).split("/")
        if split == "train":
            rows.append(Row(path, tree.places[path], folders[0], "train"))
        elif split == "val":
            rows.append(Row(path, tree.places[path], label_by_name[name], "val"))
        else:
            unlabelled += 1
    notes = [f"{unlabelled:,} images of the test set have no labels and are left out"] if unlabelled else []
    return source_of("Tiny ImageNet", rows, notes=notes)


def celeba(tree: Tree) -> Source | None:
    """Read CelebA: img_align_celeba/*.jpg, without classes.

    An attribute becomes the class where the source is a table with a column: `list_attr_celeba.txt#Smiling`.
    """
    images = tree.images
    if not images or {_folder(path) for path in images} != {"img_align_celeba"}:
        inside = files.name(tree.url) == "img_align_celeba" and all("/" not in path for path in images)
        if not (images and inside):
            return None
    return source_of("CelebA", [Row(path, tree.places[path], None, "train") for path in images])


def lsun(tree: Tree) -> Source | None:
    """Read images that were exported from LSUN. Their names are 40 hexadecimal digits.

    The images of a category lie in its folder (`bedroom_train`, `church_outdoor_val`), or below it in folders that are
    named after the first digits. Several categories become classes. A single category has no classes.
    """
    images = tree.images
    if not images or not all(_LSUN.fullmatch(PurePosixPath(path).name) for path in images):
        return None
    rows = []
    for path in images:
        *folders, _ = path.split("/")
        named = next((part for part in reversed(folders) if len(part) > 1), "")
        category, _, split = named.rpartition("_")
        known = split in ("train", "val")
        rows.append(Row(path, tree.places[path], category if known else named, split if known else "train"))
    if len({row.label for row in rows}) == 1:
        rows = [row._replace(label=None) for row in rows]
    return source_of("LSUN", rows)


def webdataset(tree: Tree) -> Source | None:
    """Read WebDataset shards: tars of images with a .cls or .json beside each image, or numbered tars of images."""
    images: dict[str, str] = {}
    labels: dict[str, int | str] = {}
    for path, place in tree.places.items():
        key, extension = base_plus_ext(path)
        if place.offset is None or key is None:
            continue
        if f".{extension.lower()}" in IMAGES:
            images[key] = path
        elif place.data is not None and (label := _label(tree, path)) is not None:
            labels[key] = label
    numbered = tree.tars and all(re.fullmatch(r"(.*[-_.])?\d+", tar) for tar in tree.tars)
    if not images or not (numbered or labels.keys() & images.keys()):
        return None
    if any(isinstance(label, str) for label in labels.values()):
        names = sorted({str(label) for label in labels.values()})
    elif "manifest.json" in tree.places:  # a collection that `sagan pack` wrote
        names = json.loads(tree.read("manifest.json"))["class_names"]
    else:
        names = [str(i) for i in range(max(map(int, labels.values()), default=-1) + 1)]
    rows = []
    for key, path in images.items():
        label = labels.get(key)
        split = split_in(path.rpartition("/")[0] or files.name(tree.url))
        rows.append(Row(path, tree.places[path], names[label] if isinstance(label, int) else label, split))
    return source_of("WebDataset", rows, names)


def _label(tree: Tree, path: str) -> int | str | None:
    """Return the label in a member of a shard. Raises UsageError where it cannot be read."""
    try:
        return label_of(suffix(path), tree.read(path))
    except ValueError as error:
        raise UsageError(f"{tree.url}: {path} holds no label: {error}", "repair or delete the shard") from error


def parquet(tree: Tree) -> Source | None:
    """Read Parquet files with a column of images and optionally a column of labels.

    Images are bytes or Hugging Face's {bytes, path}. They are first copied to this machine's disk, since a single image
    of a Parquet file cannot be read in bounded time.
    """
    paths = sorted(path for path in tree.places if suffix(path) == ".parquet" and not hidden(path))
    if not paths or tree.images:
        return None
    with contextlib.ExitStack() as cleanup:
        folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="sagan-parquet-"))
        with (Path(folder) / "images").open("wb") as copy:
            rows = [row for path in paths for row in _parquet_rows(tree, path, copy)]
        names = tables.class_names(tables.schema(tree.places[paths[0]].url))
        names = names or tables.by_number(row.label for row in rows if row.label is not None)
        source = source_of("Parquet", rows, names, local_only=True)

        def read(i: int) -> bytes:
            return source.read(i)

        weakref.finalize(read, cleanup.pop_all().close)  # the copy is deleted together with this function
    return replace(source, read=read)


def _parquet_rows(tree: Tree, path: str, copy: IO[bytes]) -> Iterator[Row]:
    """Append the images of a Parquet file to `copy`, and yield a row for each."""
    import pyarrow.parquet as pq

    with files.reading(tree.places[path].url) as file:
        table = pq.ParquetFile(file)
        image, label = tables.columns(tree.url, table.schema_arrow)
        names = tables.class_names(table.schema_arrow)
        batches = table.iter_batches(16, columns=[image, *filter(None, [label])])
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            value = row[image] if isinstance(row[image], dict) else {"bytes": row[image]}
            place = Place(copy.name, copy.tell(), copy.write(value["bytes"] or b""))
            key = f"{path}/{number:08d}" + (f" {value['path']}" if value.get("path") else "")
            name = None if label is None else row[label]
            if isinstance(name, int):  # in Hugging Face's data sets −1 means that there is no label
                name = None if name < 0 else names[name] if names else name
            yield Row(key, place, None if name is None else str(name), split_in(path))


def cifar(tree: Tree) -> Source | None:
    """Read the unpacked Python version of CIFAR-10 or CIFAR-100."""
    paths = {PurePosixPath(path).name: path for path in tree.places if PurePosixPath(path).name in _CIFAR}
    if not paths.keys() & {"batches.meta", "meta"} or tree.images:
        return None
    return _cifar({name: tree.read(path) for name, path in paths.items()})


def cifar_archive(url: str) -> Source:
    """Read cifar-10-python.tar.gz or cifar-100-python.tar.gz. Raises UsageError for any other compressed tar."""
    batches: dict[str, bytes] = {}
    try:
        with files.reading(url) as file, tarfile.open(fileobj=file, mode="r|gz") as tar:
            for member in tar:
                name, content = PurePosixPath(member.name).name, tar.extractfile(member)
                if suffix(name) in IMAGES:
                    break
                if name in _CIFAR and content:
                    batches[name] = content.read()
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist", "correct the path or URL") from None
    except (tarfile.ReadError, EOFError) as error:
        raise UsageError(f"{url} cannot be read as a tar: {error}", "decompress it first, or replace it") from None
    if not batches:
        raise UsageError(f"{url} is compressed, so its images cannot be read one by one", "decompress it first")
    return _cifar(batches)


_CIFAR = {*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", "train", "test", "meta"}


def _cifar(files_by_name: dict[str, bytes]) -> Source:
    """Read CIFAR from its batches, by name. Each row is a planar image of 3 072 bytes; it is returned as a PPM file."""
    batches = {name: _unpickle(data) for name, data in sorted(files_by_name.items())}
    try:
        meta = batches.pop("batches.meta" if "batches.meta" in batches else "meta")
        names = meta.get("label_names") or meta["fine_label_names"]
        pixels = np.concatenate([np.asarray(b["data"], np.uint8).reshape(-1, 3, 32, 32) for b in batches.values()])
        labels = np.concatenate([b["labels"] if "labels" in b else b["fine_labels"] for b in batches.values()])
        keys = [f"{name}/{file}" for name, batch in batches.items() for file in batch["filenames"]]
    except (KeyError, ValueError) as error:
        raise UsageError(f"CIFAR is incomplete: {error!r}", "get the original archive") from error
    order = np.argsort(keys, kind="stable")
    is_test = np.array([key.startswith("test") for key in keys])[order]
    stored = pixels[order]
    splits = {"test": np.flatnonzero(is_test), "train": np.flatnonzero(~is_test)}
    return Source(
        f"CIFAR-{len(names)}",
        keys=[keys[i] for i in order],
        labels=labels[order].astype(np.int64),
        class_names=list(names),
        splits={split: ids for split, ids in splits.items() if len(ids)},
        read=lambda i: b"P6 32 32 255\n" + stored[i].transpose(1, 2, 0).tobytes(),
    )


class _Unpickler(pickle.Unpickler):
    """An unpickler that builds only numbers, texts, lists, dictionaries and NumPy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the object that a pickle names. Raises UsageError for every name that CIFAR does not need."""
        if (module, name) == ("_codecs", "encode"):  # Python 3 writes bytes in this way for Python 2
            return lambda text, encoding: text.encode("latin1")
        array_parts = {"_reconstruct", "ndarray", "dtype", "_frombuffer"}
        if module.split(".")[0] == "numpy" and name in array_parts:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise UsageError(
            f"a batch of CIFAR would load {module}.{name}, which no CIFAR batch needs",
            "get the original archive",
        )


def _unpickle(data: bytes) -> dict[str, Any]:
    try:
        return dict(_Unpickler(io.BytesIO(data), encoding="latin1").load())
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise UsageError(f"a batch of CIFAR cannot be read: {error!r}", "get the original archive") from error


def titles(tree: Tree, class_names: list[str]) -> dict[str, str]:
    """Return readable names of classes that are WordNet ids, from a list in the tree or beside it.

    The result is empty where the classes are not WordNet ids, or where there is no list.
    """
    if not class_names or not all(map(_WNID.fullmatch, class_names)):
        return {}
    if text := tree.text("imagenet_class_index.json"):
        named: Iterator[tuple[str, str]] = ((wnid, name) for wnid, name in json.loads(text).values())
    else:
        lists = ("imagenet_map_clsloc.txt", "LOC_synset_mapping.txt", "words.txt")
        text = next(filter(None, map(tree.text, lists)), "")
        lines = (re.match(r"(n\d{8})\s+(?:\d+\s+)?(.+)", line) for line in text.splitlines())
        named = ((line[1], line[2]) for line in lines if line)
    wanted = set(class_names)
    return {wnid: name.split(",")[0].replace("_", " ") for wnid, name in named if wnid in wanted}


def _folder(path: str) -> str:
    return PurePosixPath(path).parent.name


LAYOUTS: list[Callable[[Tree], Source | None]] = [tiny_imagenet, imagenet, celeba, lsun, webdataset, cifar, parquet]
"""The layouts in the order in which they are tried."""
