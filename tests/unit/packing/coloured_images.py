"""Small images that tests identify by their colour, and folders, tars and sources of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from pipeline.packing.image_source import Source


def picture(a: int, b: int = 0, c: int = 0) -> bytes:
    """A small image of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (a, b, c)).save(out, "PNG")
    return out.getvalue()


def colour(data: bytes) -> tuple[int, ...]:
    """The colour in the middle of a picture."""
    pixel = Image.open(io.BytesIO(data)).convert("RGB").getpixel((4, 4))
    assert isinstance(pixel, tuple)
    return tuple(int(value) for value in pixel)


def write(folder: Path, contents: Mapping[str, bytes | str]) -> Path:
    """Write files into a folder; returns the folder."""
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def tar(contents: dict[str, bytes]) -> bytes:
    """A plain tar with these members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return out.getvalue()


DAMAGES = ("truncated", "checksum", "noise")


def damaged_tar(contents: dict[str, bytes], damage: str) -> bytes:
    """A tar that breaks off or is damaged where its last member begins."""
    data = tar(contents)
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        start = file.getmembers()[-1].offset
    before, rest = data[:start], data[start:]
    return before + {"truncated": rest[:300], "checksum": b"?" + rest[1:], "noise": b"x" * len(rest)}[damage]


def by_colour(source: Source) -> dict[tuple[int, ...], tuple[str, str | None]]:
    """colour → (split, class)."""
    return {
        colour(source.read(int(i))): (split, source.class_names[source.labels[i]] if source.class_names else None)
        for split, ids in source.splits.items()
        for i in ids
    }


def png(width: int, height: int, shade: int = 0) -> bytes:
    """An image of one dark colour."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), (shade, shade, 0)).save(out, "PNG")
    return out.getvalue()
