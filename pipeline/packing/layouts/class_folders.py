"""Images in folders: the class of an image is its folder, and folders named train, val, test, … are splits."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import UsageError
from pipeline.packing.archives_and_folders import IMAGES, Tree, folders_of, ignored, suffix
from pipeline.packing.classes_and_splits import split_named, splits_of_folders
from pipeline.packing.image_source import WHAT_TO_GIVE, Row, Source, source_of
from pipeline.storage import files


def class_folders(tree: Tree) -> Source:
    """Read images whose class is their parent folder.

    Folders that are all named train, val, test, … are splits and not classes.
    """
    images = tree.images
    if not images:
        raise UsageError(
            f"{tree.url} holds no images ({len(tree.places)} files, none ends in .jpg, .png, …)", WHAT_TO_GIVE
        )
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
    if not files.is_folder(tree.url):
        return set()
    root = files.local_path(tree.url)
    above = {(root / path).parent.parent for path in tree.images if "/" in path}
    folders = [path for folder in above if folder.is_dir() for path in folder.iterdir() if path.is_dir()]
    return {path.name for path in folders if ignored(path.name) is None and not any(path.iterdir())}
