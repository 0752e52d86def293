"""Layouts that data sets are published in. Each function recognises its own in a tree of files, else returns None."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from webdataset.tariterators import base_plus_ext

from pipeline.data import tables
from pipeline.data.index import label_of
from pipeline.data.tree import IMAGES, Place, Row, Source, Tree, hidden, source_of, split_in, suffix
from pipeline.errors import UsageError
from pipeline.storage import files

_WNID = re.compile(r"n\d{8}")
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_LSUN = re.compile(r"[0-9a-f]{40}\.(webp|jpg|png)")


def imagenet(tree: Tree) -> Source | None:
    """ILSVRC2012 with flat validation images and their ground truth; train as tar of tars or class folders, or not."""
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
        ids = truth.split()  # ILSVRC's own numbers, which are not in the order of the wnids
        labels = {path: wnid_of[ids[int(match[1]) - 1]] for path, match in flat.items()}
    elif solution := tree.text("LOC_val_solution.csv"):  # Kaggle's
        wnids = {
            name: boxes.split()[0] for name, boxes in (line.split(",") for line in solution.split("\n")[1:] if line)
        }
        labels = {path: wnids[PurePosixPath(path).stem] for path in flat}
    else:
        raise UsageError(
            f"{tree.url} holds validation images of ImageNet, which have no classes without their ground truth",
            "put ILSVRC2012_validation_ground_truth.txt and imagenet_map_clsloc.txt into the folder or beside it",
        )
    rows = [Row(path, tree.places[path], label, "val") for path, label in labels.items()]
    train = [path for path in tree.images if _WNID.fullmatch(_folder(path))]
    return source_of("ImageNet", rows + [Row(path, tree.places[path], _folder(path), "train") for path in train])


def tiny_imagenet(tree: Tree) -> Source | None:
    """train/<wnid>/images/*.JPEG, and val/images/*.JPEG by the table val_annotations.txt; test has no labels."""
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
    """img_align_celeba/*.jpg, without classes; `list_attr_celeba.txt#Smiling` is a table with an attribute's."""
    images = tree.images
    if not images or {_folder(path) for path in images} != {"img_align_celeba"}:
        inside = files.name(tree.url) == "img_align_celeba" and all("/" not in path for path in images)
        if not (images and inside):
            return None
    return source_of("CelebA", [Row(path, tree.places[path], None, "train") for path in images])


def lsun(tree: Tree) -> Source | None:
    """Images exported from LSUN, named by 40 hex digits, in folders named by the first of these or flat.

    Several categories (`bedroom_train`, `church_outdoor_val`) are classes, one is none.
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
    """Shards of others: images with a .cls or .json beside them, or tars that are numbered and not named."""
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
    elif "manifest.json" in tree.places:  # shards of ours
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
    try:
        return label_of(suffix(path), tree.read(path))
    except ValueError as error:
        raise UsageError(f"{tree.url}: {path} is no label: {error}", "mend the shard, or delete it") from error


def parquet(tree: Tree) -> Source | None:
    """Parquet with a column of images, as bytes or as Hugging Face's {bytes, path}, and perhaps one of labels.

    Columns cannot be read at random in bounded time: images are copied to this machine's disk first.
    """
    paths = sorted(path for path in tree.places if suffix(path) == ".parquet" and not hidden(path))
    if not paths or tree.images:
        return None
    spool = tempfile.TemporaryDirectory(prefix="sagan-parquet-")
    with (Path(spool.name) / "images").open("wb") as copy:
        rows = [row for path in paths for row in _parquet_rows(tree, path, copy)]
    names = tables.class_names(tables.schema(tree.places[paths[0]].url))
    names = names or tables.by_number(row.label for row in rows if row.label is not None)
    source = source_of("Parquet", rows, names, here=True)

    def read(i: int, _alive: object = spool) -> bytes:  # the copy goes when nobody can read from it any more
        return source.read(i)

    return replace(source, read=read)


def _parquet_rows(tree: Tree, path: str, copy: IO[bytes]) -> Iterator[Row]:
    """The images of a file, appended to `copy` one after the other."""
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
            given = None if label is None else row[label]
            if isinstance(given, int):  # −1 is Hugging Face's for none
                given = None if given < 0 else names[given] if names else given
            yield Row(key, place, None if given is None else str(given), split_in(path))


def cifar(tree: Tree) -> Source | None:
    """The python version of CIFAR-10 or CIFAR-100, unpacked."""
    found = {PurePosixPath(path).name: path for path in tree.places if PurePosixPath(path).name in _CIFAR}
    if not found.keys() & {"batches.meta", "meta"} or tree.images:
        return None
    return _cifar({name: tree.read(path) for name, path in found.items()})


def cifar_archive(url: str) -> Source:
    """cifar-10-python.tar.gz or cifar-100-python.tar.gz. Raises UsageError for any other compressed tar."""
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
        raise UsageError(f"{url} cannot be read as a tar: {error}", "decompress it first, or check it") from None
    if not batches:
        raise UsageError(f"{url} is compressed, so that its images cannot be read at random", "decompress it first")
    return _cifar(batches)


_CIFAR = {*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", "train", "test", "meta"}


def _cifar(files_by_name: dict[str, bytes]) -> Source:
    """Rows of 3 072 bytes, planar; handed out as PPM, the plainest file there is."""
    batches = {name: _unpickle(data) for name, data in sorted(files_by_name.items())}
    try:
        meta = batches.pop("batches.meta" if "batches.meta" in batches else "meta")
        names = meta.get("label_names") or meta["fine_label_names"]
        pixels = np.concatenate([np.asarray(b["data"], np.uint8).reshape(-1, 3, 32, 32) for b in batches.values()])
        labels = np.concatenate([b["labels"] if "labels" in b else b["fine_labels"] for b in batches.values()])
        keys = [f"{name}/{file}" for name, batch in batches.items() for file in batch["filenames"]]
    except (KeyError, ValueError) as error:
        raise UsageError(f"this is not all of CIFAR: {error!r}", "get the original archive") from error
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
    """Builds numbers, texts, lists, dictionaries and NumPy arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Called for everything that a pickle names. Raises UsageError for what could do harm."""
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, encoding: text.encode("latin1")
        array_parts = {"_reconstruct", "ndarray", "dtype", "_frombuffer"}
        if module.split(".")[0] == "numpy" and name in array_parts:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise UsageError(
            f"a batch of CIFAR would load {module}.{name}, which no batch needs", "get the original archive"
        )


def _unpickle(data: bytes) -> dict[str, Any]:
    try:
        return dict(_Unpickler(io.BytesIO(data), encoding="latin1").load())
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise UsageError(f"a batch of CIFAR cannot be read: {error!r}", "get the original archive") from error


def titles(tree: Tree, class_names: list[str]) -> dict[str, str]:
    """What people call classes that are WordNet ids, from a list of them in the tree or beside it; else nothing."""
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
