"""Reading of a shard: the samples of a WebDataset tar."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from posixpath import splitext
from typing import NamedTuple

from pipeline.collection.image_codec import EXTENSIONS
from pipeline.collection.parse_labels import LABELS, MOST_LABEL_BYTES, label_files_of, label_of
from pipeline.errors import CorruptError
from pipeline.storage.validate_json import printable

_IMAGES = {*(f".{extension}" for extension in EXTENSIONS.values()), ".jpeg"}


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


def tar_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a plain tar. Raises tarfile.ReadError where it is truncated or damaged.

    A `TarFile` takes a header that is damaged or incomplete for the end of the tar, unless it is the first. A tar ends
    with zeros, or where its last member ends.
    """
    yield from tar
    assert tar.fileobj is not None  # a tar that is being read has a file
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"it is truncated or damaged: there is no header of a member at byte {tar.offset:,}")


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
            for member in tar_members(tar):
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
