"""Layouts of published data sets. Each function returns None where a tree of files does not have its layout."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import IO

from pipeline.collection.manifest import INDEX, MANIFEST, Collection
from pipeline.collection.parse_labels import LABELS, MOST_LABEL_BYTES, label_files_of, label_of
from pipeline.errors import UsageError
from pipeline.packing.archives_and_folders import IMAGES, Place, Tree, ignored, suffix
from pipeline.packing.classes_and_splits import split_in
from pipeline.packing.image_source import Row, Source, source_of, tally, with_local_copy
from pipeline.packing.layouts import tables
from pipeline.packing.layouts.cifar import cifar
from pipeline.storage import files
from pipeline.storage.validate_json import printable

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
    rows += [Row(path, tree.places[path], _folder(path), "train") for path in train]
    return source_of("ImageNet", rows, labels_are_names=True)


def tiny_imagenet(tree: Tree) -> Source | None:
    """Read Tiny ImageNet: train/<WordNet id>/images/*.JPEG, and val/images/*.JPEG with val_annotations.txt.

    Test images have no labels, so `source_of` leaves them out.
    """
    table = next((path for path in tree.places if path.endswith("val/val_annotations.txt")), None)
    if table is None:
        return None
    root = table.removesuffix("val/val_annotations.txt")
    label_by_name = dict(line.split("\t")[:2] for line in tree.read(table).decode().splitlines())
    rows = []
    for path in tree.images:
        split, *folders, name = path.removeprefix(root).split("/")
        label = folders[0] if split == "train" else label_by_name[name] if split == "val" else None
        rows.append(Row(path, tree.places[path], label, split))
    return source_of("Tiny ImageNet", rows, labels_are_names=True)


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
    return source_of("LSUN", rows, labels_are_names=True)


def webdataset(tree: Tree) -> Source | None:
    """Read WebDataset shards: tars of images with a .cls or .json beside each image, or numbered tars of images.

    A collection that `sagan pack` wrote is read with the labels and splits of its index.
    """
    if {MANIFEST, INDEX} <= tree.places.keys():
        return _packed(tree)
    stored = [path for path, place in tree.places.items() if place.offset is not None and ignored(path) is None]
    label_files = label_files_of(stored, IMAGES)
    labels = {path: _label(tree, members) for path, members in label_files.items()}
    numbered = tree.tars and all(re.fullmatch(r"(.*[-_.])?\d+", tar) for tar in tree.tars)
    if not label_files or not (numbered or any(label is not None for label in labels.values())):
        return None
    rows = []
    for path, label in labels.items():
        split = split_in(path.rpartition("/")[0] or files.name(tree.url)) or "train"
        rows.append(Row(path, tree.places[path], label, split))
    source = source_of("WebDataset", rows)
    if not source.class_names:
        source.notes.append("the tars are taken for shards without labels, since their names are numbers")
    images = {path for path in stored if suffix(path) in IMAGES}
    companions = dict.fromkeys(images - label_files.keys(), "accompanies another image of its sample")
    used = {*source.keys, *(member for members in label_files.values() for member in members)}
    return replace(source, left_out=tally(tree.left_out(used, companions | source.unused)))


def _packed(tree: Tree) -> Source:
    """Read a collection that `sagan pack` wrote."""
    collection = Collection.open(tree.url)
    urls = [collection.shard_url(shard) for shard in collection.shards]
    positions = zip(collection.shard.tolist(), collection.offset.tolist(), strict=True)
    number_of = {(urls[shard], offset): i for i, (shard, offset) in enumerate(positions)}
    rows, unused = [], {}
    for path in tree.images:
        place = tree.places[path]
        if (i := number_of.get((place.url, place.offset))) is not None:
            label = int(collection.labels[i]) if collection.class_names else None
            rows.append(Row(path, place, label, collection.shards[collection.shard[i]].split))
        else:
            unused[path] = "not in the index of the collection"
    source = source_of("WebDataset", rows, collection.class_names)
    used = {*source.keys, *(path for path in tree.places if suffix(path) in LABELS)}
    return replace(source, unused=unused, left_out=tally(tree.left_out(used, unused)))


def _label(tree: Tree, members: list[str]) -> int | str | None:
    """Return the label of an image from its label files. Raises UsageError where one of them cannot be read."""
    for path in members:
        try:
            label = label_of(suffix(path), tree.places[path].read(MOST_LABEL_BYTES))
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(
                f"{tree.url}: {printable(path)} holds no label: {error}", "repair or delete the shard"
            ) from error
        if label is not None:
            return label
    return None


def stylegan(tree: Tree) -> Source | None:
    """Read images as StyleGAN's dataset_tool.py writes them: numbered folders, and dataset.json with the labels."""
    table = min((path for path in tree.places if PurePosixPath(path).name == "dataset.json"), key=len, default=None)
    if table is None or not tree.images:
        return None
    content = json.loads(tree.read(table))
    if not isinstance(content, dict) or "labels" not in content:
        return None
    root = table.removesuffix("dataset.json")
    label_of_image = dict(content["labels"] or [])
    rows = [Row(path, tree.places[path], label_of_image.get(path.removeprefix(root)), "train") for path in tree.images]
    return source_of("StyleGAN", rows)


def bundles(tree: Tree) -> Source | None:
    """Read numbered images in folders that bundle 100, 1 000 or 10 000 of them, as in FFHQ. The folders are no classes.

    The number of a folder is the number of its images without the last digits, with or without zeros in their place,
    or the last digits of the numbers.
    """
    images = tree.images
    if not images:
        return None
    numbers = []
    for path in images:
        bundle, image = re.fullmatch(r"\d{3,}", _folder(path)), re.search(r"(\d+)$", PurePosixPath(path).stem)
        if bundle is None or image is None or max(len(bundle[0]), len(image[0])) > 18:
            return None
        numbers.append((int(bundle[0]), int(image[1])))
    sizes = (100, 1000, 10_000)
    rules: list[Callable[[int, int], int]] = [lambda n, k: n // k, lambda n, k: n // k * k, lambda n, k: n % k]
    if not any(all(rule(n, k) == bundle for bundle, n in numbers) for rule in rules for k in sizes):
        return None
    notes = ["folders that bundle images by their numbers are not classes, for example " + _folder(images[0])]
    return source_of("bundles", [Row(path, tree.places[path], None, "train") for path in images], notes=notes)


def parquet(tree: Tree) -> Source | None:
    """Read Parquet files with a column of images and optionally a column of labels.

    Images are bytes or Hugging Face's {bytes, path}. They are first copied to this machine's disk, since a single image
    of a Parquet file cannot be read in bounded time. Files in a tar are not read. Other images are left out where a
    Parquet file surely has images (`tables.has_images`).
    """
    paths = sorted(
        path
        for path, place in tree.places.items()
        if suffix(path) == ".parquet" and ignored(path) is None and place.offset is None
    )
    if tree.images:  # they may be the data set, and the Parquet files a description of it
        paths = [path for path in paths if tables.has_images(tree.places[path].url)]
    if not paths:
        return None
    with contextlib.ExitStack() as cleanup:
        folder = cleanup.enter_context(files.temporary_folder("parquet"))
        with (folder / "images").open("wb") as copy:
            rows = [row for path in paths for row in _parquet_rows(tree, path, copy)]
        source = source_of("Parquet", rows, tables.class_names(tables.schema(tree.places[paths[0]].url)))
        left_out = tally(tree.left_out(paths, {}) | source.unused)
        return replace(with_local_copy(source, cleanup), left_out=left_out)


def _parquet_rows(tree: Tree, path: str, copy: IO[bytes]) -> Iterator[Row]:
    """Append the images of a Parquet file to `copy`, and yield a row for each."""
    with tables.open_parquet(tree.places[path].url) as table:
        image, label = tables.columns(tree.url, table.schema_arrow)
        batches = table.iter_batches(16, columns=[image, *filter(None, [label])])
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            value = row[image] if isinstance(row[image], dict) else {"bytes": row[image]}
            place = Place(copy.name, copy.tell(), copy.write(value["bytes"] or b""))
            key = f"{path}/{number:08d}" + (f" {value['path']}" if value.get("path") else "")
            yield Row(key, place, None if label is None else row[label], split_in(path) or "train")


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


LAYOUTS: list[Callable[[Tree], Source | None]] = [
    *(tiny_imagenet, imagenet, celeba, lsun, stylegan, webdataset, bundles, cifar, parquet),
]
"""The layouts in the order in which they are tried."""
