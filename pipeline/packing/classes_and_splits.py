"""Names and order of classes, and names of splits, for every kind of source."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from pipeline.collection.parse_labels import parse_label
from pipeline.errors import UsageError

_WORDS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
    "heldout": ("heldout", "holdout"),
}
SPLITS = {word: split for split, words in _WORDS.items() for word in words}
"""Name of the split that a word stands for. Words are in lower case and have no hyphen, underscore or blank."""


def split_named(name: str) -> str | None:
    """Return the split that a folder is named after; None where it is not. Letter case does not matter."""
    return SPLITS.get(re.sub(r"[-_ ]", "", name.lower()))


def split_in(path: str) -> str | None:
    """Return the split that a word of a path names, as in data/train-00000-of-00005.parquet; None where none does."""
    return next((SPLITS[word] for word in _words(path) if word in SPLITS), None)


def splits_of_folders(names: Collection[str]) -> dict[str, str] | None:
    """Return the split of each of the folders beside each other, by their names; None where they are not splits.

    Folders are splits where all are named after one, such as Training. Names with more words, such as training_set and
    test_set, are splits where two of them differ in the split only.

    Raises UsageError where folders of two splits stand beside a folder that is no split.
    """
    found = {name: split_named(name) or split_in(name) for name in names}
    splits = {name: split for name, split in found.items() if split is not None}
    if len(splits) == len(names) and all(map(split_named, names)):
        return splits
    groups: dict[tuple[str, ...], set[str]] = {}
    for name, split in splits.items():
        rest = () if split_named(name) else tuple("*" if word in SPLITS else word for word in _words(name))
        groups.setdefault(rest, set()).add(split)
    if not any(len(group) > 1 for group in groups.values()):
        return None
    if len(splits) < len(names):
        raise UsageError(
            f"the folders {' and '.join(sorted(splits)[:2])} are splits, but {min(set(names) - splits.keys())} is none",
            "name the splits, for example: sagan pack train=SOURCE/train heldout=SOURCE/test DESTINATION",
        )
    return splits


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case, without digits and signs."""
    joined = re.sub(r"(?<![a-z])(held|hold)[-_ ]out(?![a-z])", r"\1out", name.lower())
    return [word for word in re.split(r"[^a-z]+", joined) if word]


def class_order(names: Iterable[str]) -> list[str]:
    """Return distinct class names in their order: numeric where all are whole numbers, else alphabetical."""
    distinct = set(names)
    if all(re.fullmatch(r"[0-9]{1,18}", name) for name in distinct):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)


def class_names_of(
    labels: Sequence[tuple[str, object]], known: Sequence[str] | None = None
) -> tuple[list[str | None], list[str]]:
    """Return the class name of each image, and all class names in the order of their indices.

    The labels of a source are all numbers, all words, or all true and false. `pipeline.collection.parse_labels` defines
    which labels are numbers, and which values mean that an image has no label.

    Args:
        labels: Name of each image, and its label as the source has it.
        known: Class names by number, where the source has them. Default: a class is named after its number.

    Raises UsageError that names the image where a label is wrong, or where numbers and words are mixed.
    """
    parsed: list[int | str | None] = []
    first: dict[str, tuple[str, object]] = {}
    for image, value in labels:
        try:
            label = parse_label(value)
            if known is not None and isinstance(label, int) and not label < len(known):
                raise ValueError(f"{label} is not a class: there are {len(known):,} classes, numbered from 0")
        except ValueError as error:
            raise UsageError(f"the label of {image!a} is wrong: {error}", "correct the label") from None
        parsed.append(label)
        if label is not None:
            kind = {bool: "true and false", int: "numbers"}.get(type(label), "words")
            first.setdefault(kind, (image, label))
    if len(first) > 1:
        examples = ", ".join(f"{image!a} has {label!a}" for image, label in first.values())
        raise UsageError(
            f"the labels are neither all numbers nor all words: {examples}",
            "write all labels as numbers or all as words; -1 or null means that an image has no label",
        )
    if known is not None and "words" not in first:
        return [None if label is None else known[int(label)] for label in parsed], list(known)
    names = [None if label is None else label if isinstance(label, str) else str(int(label)) for label in parsed]
    return names, class_order(name for name in names if name is not None)
