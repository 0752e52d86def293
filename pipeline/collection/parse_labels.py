"""Labels of images: which members of a shard hold a label, and how the value of a label is read."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from posixpath import basename, splitext

LABELS = (".cls", ".json")
"""Suffixes of the members that hold the label of a sample. The first one that holds a label decides."""
MOST_LABEL_BYTES = 1_000_000
"""Greatest size of a member that holds a label."""
MOST_LABEL = 1_000_000
"""Greatest number that is a label."""
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")
_LONGEST_NUMBER = 30  # letters


def label_files_of(names: Iterable[str], images: Collection[str]) -> dict[str, list[str]]:
    """Return the label files of each image among the files of WebDataset shards, in the order of the images.

    The files of a sample have one name and different extensions. WebDataset cuts the name at its first dot. Other
    programs write dots into the name and cut it at the last one. Both are understood: `1.left.jpg` belongs to
    `1.left.cls` or to `1.cls`. Where `1.jpg` exists, `1.mask.png` accompanies it and is no image of its own.

    Args:
        names: Paths of the files.
        images: Suffixes of images, in lower case with the dot.
    """
    pictures: list[tuple[str, str, str]] = []
    labels: dict[str, list[str]] = {}
    for name in names:
        stem, suffix = splitext(name)
        short = name[: len(name) - len(basename(name))] + basename(name).partition(".")[0]
        if basename(name).startswith("."):
            continue
        if suffix.lower() in images:
            pictures.append((name, stem, short))
        elif suffix.lower() in LABELS:
            labels.setdefault(stem, []).append(name)
    for files in labels.values():
        files.sort(key=lambda name: LABELS.index(splitext(name)[1].lower()))
    whole = {stem for _, stem, short in pictures if stem == short}
    return {
        name: labels.get(stem) or labels.get(short) or []
        for name, stem, short in pictures
        if stem == short or short not in whole
    }


def label_of(suffix: str, data: bytes) -> int | str | None:
    """Return the label that a member of a WebDataset sample contains; None where it contains none.

    A `.cls` member is a number or a class name. A `.json` member has the label under the key `label` or `cls`. Raises
    ValueError where the member is not text or valid JSON, or where `parse_label` does.

    Args:
        suffix: Suffix of the member, with the dot.
        data: Bytes of the member.
    """
    if suffix == ".cls":
        return parse_label(data.decode())
    if suffix != ".json":
        return None
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    return parse_label(content.get("label", content.get("cls"))) if isinstance(content, dict) else None


def parse_label(value: object) -> int | str | None:
    """Return a label: a number from 0 to MOST_LABEL, a word, or True or False; None where there is no label.

    A text of digits is a number, and so is a floating-point number without a fraction. −1, null and an empty text mean
    that there is no label. Raises ValueError with the reason for any other value.
    """
    if value is None or isinstance(value, bool):
        return value
    number = value
    if isinstance(value, str):
        text = value.strip()
        if not _NUMBER.fullmatch(text):
            return text or None
        if len(text) > _LONGEST_NUMBER:
            raise ValueError(f"{text[:_LONGEST_NUMBER]}… is too large; a label is at most {MOST_LABEL:,}")
        number = float(text) if "." in text else int(text)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int):
        what = f"{number!r}" if isinstance(number, float) else f"a {type(value).__name__}"
        raise ValueError(f"a label is a whole number or a word, not {what}")
    if number == -1:
        return None
    if number < 0:
        raise ValueError(f"{number} is negative; only -1 is allowed, which means that there is no label")
    if number > MOST_LABEL:
        raise ValueError(f"{number} is too large; a label is at most {MOST_LABEL:,}")
    return number
