"""Reading of a shard: the samples of a WebDataset tar."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Collection, Iterable
from pathlib import Path
from posixpath import basename, splitext
from typing import NamedTuple

from pipeline.collection.image_codec import EXTENSIONS
from pipeline.errors import CorruptError
from pipeline.storage.validate_json import printable

_IMAGES = {*(f".{extension}" for extension in EXTENSIONS.values()), ".jpeg"}
LABELS = (".cls", ".json")
"""Suffixes of the members that hold the label of a sample. The first one that holds a label decides."""
MOST_LABEL_BYTES = 1_000_000
"""Greatest size of a member that holds a label."""
MOST_LABEL = 1_000_000
"""Greatest number that is a label."""
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")
_LONGEST_NUMBER = 30  # letters


class Sample(NamedTuple):
    """One sample of a shard.

    Attributes:
        name: Name of the image in the tar.
        offset: First byte of the image in the tar.
        length: Length of the image in bytes.
        label: Class index, or a class name in a shard that another program wrote; None where the sample has no label.
    """

    name: str
    offset: int
    length: int
    label: int | str | None


def read_shard(path: Path) -> list[Sample]:
    """Return the samples of a WebDataset tar in their order.

    Somebody else may have written the tar. Links and other members that are not plain files are ignored, since the
    index needs the bytes of an image at their own place. Raises CorruptError where the file is no WebDataset tar or a
    label is too large.
    """
    members: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int | str | None] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, suffix = member.name.removeprefix("./"), splitext(member.name)[1].lower()
                if not member.isreg() or member.issparse():  # a sparse member unpacks to more bytes than the tar has
                    continue
                members[name] = member
                if suffix in LABELS and (file := tar.extractfile(member)):
                    if member.size > MOST_LABEL_BYTES:
                        raise ValueError(f"{name} has {member.size:,} bytes; a label has at most {MOST_LABEL_BYTES:,}")
                    labels[name] = label_of(suffix, file.read())
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise CorruptError(f"{path.name} is not a shard: {printable(str(error))}") from error
    samples = []
    for name, label_files in label_files_of(members, _IMAGES).items():
        label = next((labels[file] for file in label_files if labels[file] is not None), None)
        samples.append(Sample(name, members[name].offset_data, members[name].size, label))
    return samples


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
