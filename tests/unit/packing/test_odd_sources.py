"""A folder with everything that real folders have: taken as a person would, or listed with the reason."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.collection.verify import verify_collection
from pipeline.config.schema import PackSection
from pipeline.errors import UsageError
from pipeline.packing.pack import pack

RED, WHITE, GREY, GREEN = (255, 0, 0), (255, 255, 255), (128, 128, 128), (0, 255, 0)
CLASS = "κλάση 2\nзвери.v1"


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, bits: int, kind: int, data: bytes) -> bytes:
    """What Pillow does not write: `data` are raw rows, each with its filter byte."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def turned() -> bytes:
    """Red on the left half once upright; stored on its side."""
    upright = Image.new("RGB", (40, 40), GREEN)
    upright.paste(RED, (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)


def good() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """Name → (file, the colour at a quarter of its width, in the middle)."""
    red, clear = Image.new("RGB", (40, 40), RED), Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    frames = [Image.new("RGB", (40, 40), colour) for colour in (RED, GREEN)]
    palette = Image.new("P", (40, 40), 3)
    palette.putpalette([0, 0, 0] * 256)
    sixteen = Image.fromarray(np.full((40, 40), 128 * 257, dtype=np.uint16))
    return {
        "cmyk.jpg": (file_of(red.convert("CMYK"), "JPEG", quality=95), RED),
        "palette.png": (file_of(red.convert("P")), RED),
        "clear.png": (file_of(clear), WHITE),
        "clear palette.gif": (file_of(palette, "GIF", transparency=3), WHITE),
        "grey.jpg": (file_of(Image.new("L", (40, 40), 128), "JPEG"), GREY),
        "grey and alpha.png": (file_of(Image.new("LA", (40, 40), (0, 0))), WHITE),
        "16 bit grey.png": (file_of(sixteen), GREY),
        "16 bit colour.png": (png(4, 4, 16, 2, (b"\0" + b"\xff\xff\0\0\0\0" * 4) * 4), RED),
        "turned.jpg": (turned(), RED),
        "bad exif.jpg": (file_of(red, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 40), RED),
        "1x1.png": (file_of(Image.new("RGB", (1, 1), RED)), RED),
        "10000x20.png": (file_of(Image.new("RGB", (10_000, 20), RED)), RED),
        "20x10000.png": (file_of(Image.new("RGB", (20, 10_000), RED)), RED),
        "animated.gif": (file_of(frames[0], "GIF", save_all=True, append_images=frames[1:]), RED),
        "animated.webp": (file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), RED),
        "LOUD.PNG": (file_of(red), RED),
        "png called.jpg": (file_of(red), RED),
        "dots.in.its.name.v2.png": (file_of(red), RED),
        "new\nline and\ttab.png": (file_of(red), RED),
        "σκύλος 🐶 собака.png": (file_of(red), RED),
        os.fsdecode(b"caf\xe9.png"): (file_of(red), RED),
        "-rf ~ $HOME 'quoted' \"twice\".png": (file_of(red), RED),
    }


BROKEN = {
    "zero.jpg": (b"", "the file is empty"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
    "bomb.png": (png(40_000, 40_000, 1, 0, b"\0" * 5001), "exceeds limit"),
    "half.jpg": (file_of(Image.effect_noise((64, 64), 50), "JPEG")[:1200], "cannot be decoded"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    for name, (data, _) in good().items():
        (root / "ant").mkdir(parents=True, exist_ok=True)
        (root / "ant" / name).write_bytes(data)
    (root / CLASS).mkdir()
    (root / CLASS / "red.png").write_bytes(file_of(Image.new("RGB", (40, 40), RED)))
    for name in ("._x.jpg", ".hidden.png", "Thumbs.db", "notes.txt"):
        (root / "ant" / name).write_bytes(b"\0\x05\x16\x07 not an image")
    (root / "__MACOSX" / "ant").mkdir(parents=True)
    (root / "__MACOSX" / "ant" / "._x.jpg").write_bytes(b"x")
    (root / "ant" / "up").symlink_to("..")
    (root / "ant" / "here").symlink_to(".")
    (root / "bee").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.png").symlink_to(root / "ant" / "1x1.png")
    return root


def test_every_readable_image_is_packed_as_viewers_show_it(folder: Path, tmp_path: Path) -> None:
    collection = pack(f"{tmp_path}/set", PackSection(source=str(folder), resolution=32))
    verify_collection(collection.url)
    assert sorted(collection.class_names) == sorted(["ant", "bee", CLASS.replace("\n", "\\n")])
    keys = Path(collection.url, "keys.txt").read_text().splitlines()
    expected = {f"ant/{name}": colour for name, (_, colour) in good().items()}
    expected |= {"bee/linked.png": RED, f"{CLASS}/red.png": RED}
    assert len(keys) == len(expected)
    escaped = {"\n": "\\n", "\t": "\\t", "\udce9": "\\udce9"}
    data = Path(collection.url, "train-00000.tar").read_bytes()
    for name, colour in expected.items():
        i = keys.index("".join(escaped.get(letter, letter) for letter in name))
        pixels = Image.open(io.BytesIO(data[collection.offset[i] :][: collection.length[i]]))
        found = pixels.getpixel((8, 16))
        assert isinstance(found, tuple)
        assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) < 8, name


def test_unreadable_files_are_listed_with_the_reason(folder: Path, tmp_path: Path) -> None:
    for name, (data, _) in BROKEN.items():
        (folder / "bee" / name).write_bytes(data)
    (folder / "bee" / "gone.png").symlink_to(folder / "nothing")
    (folder / "bee" / "itself.png").symlink_to("itself.png")
    with pytest.raises(UsageError, match="6 images cannot be used") as caught:
        pack(f"{tmp_path}/set", PackSection(source=str(folder), resolution=32))
    reasons = BROKEN | dict.fromkeys(("gone.png", "itself.png"), (b"", "the file does not exist"))
    for name, (_, reason) in reasons.items():
        (line,) = [line for line in caught.value.message.splitlines() if f"bee/{name}: " in line]
        assert reason in line
    excluded = [line.strip().partition(": ")[0] for line in caught.value.message.splitlines()[1:]]
    (tmp_path / "bad.txt").write_text("\n".join(excluded))
    section = PackSection(source=str(folder), resolution=32, exclude=f"{tmp_path}/bad.txt")
    assert pack(f"{tmp_path}/set", section).size("train") == len(good()) + 2
