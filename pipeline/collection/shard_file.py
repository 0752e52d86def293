"""Reading of a shard: the samples of a WebDataset tar."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

from pipeline.collection.image_codec import EXTENSIONS
from pipeline.errors import CorruptError
from pipeline.storage.stored_json import printable

_IMAGES = {*EXTENSIONS.values(), "jpeg"}
_MOST_LABEL_BYTES = 2**20  # a .json member may hold captions and other facts beside the label


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

    Somebody else may have written the tar. Members that are not plain files, such as links, are ignored. Raises
    CorruptError where the file is no WebDataset tar or where a label has more than 1 MiB.
    """
    images: dict[str, Sample] = {}
    labels: dict[str, int | str | None] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg() or member.issparse():  # a sparse member unpacks to more bytes than the tar has
                    continue
                key, extension = base_plus_ext(member.name)
                if extension and extension.lower() in _IMAGES:
                    images[key] = Sample(member.name.removeprefix("./"), member.offset_data, member.size, None)
                elif extension in ("cls", "json") and (file := tar.extractfile(member)):
                    if member.size > _MOST_LABEL_BYTES:
                        raise ValueError(f"the label {member.name!r} has {member.size:,} bytes")
                    labels[key] = label_of(f".{extension}", file.read())
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise CorruptError(f"{path.name} is not a shard: {printable(str(error))}") from error
    return [sample._replace(label=labels.get(key)) for key, sample in images.items()]


def label_of(extension: str, data: bytes) -> int | str | None:
    """Return the label that a member of a WebDataset sample contains; None where it contains none.

    A `.cls` member is a number or a class name. A `.json` member has the label under the key `label` or `cls`. A text
    of digits is returned as a number. Raises ValueError where a `.json` member is not valid JSON or a `.cls` member is
    not text.

    Args:
        extension: Extension of the member, with the dot.
        data: Bytes of the member.
    """
    if extension == ".json":
        content = json.loads(data)
        value = content.get("label", content.get("cls")) if isinstance(content, dict) else None
    else:
        value = data.decode().strip() if extension == ".cls" else None
    if isinstance(value, str) and value.isdigit():
        return int(value)
    return value if isinstance(value, int | str) else None
