from __future__ import annotations

import io
import resource
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.collection.image_codec import EXTENSIONS, crop_and_encode, decode_into, size_of_stored


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert image.mode == "RGB"
    return np.asarray(image)


def prepared(image: Image.Image, resolution: int = 32, kind: str = "PNG", **options: Any) -> np.ndarray:
    """As a PNG shard would hold it."""
    return pixels_of(crop_and_encode(file_of(image, kind, **options), resolution, "png", 95))


def photo(height: int, width: int) -> Image.Image:
    """Something smooth, so that lossy encodings stay close to it."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), 128 + 100 * np.sin((x + y) / 11)]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


@pytest.mark.parametrize("encoding", EXTENSIONS)
def test_every_encoding_is_square_rgb_of_the_resolution(encoding: str) -> None:
    data = crop_and_encode(file_of(photo(70, 100)), 64, encoding, 95)
    assert pixels_of(data).shape == (64, 64, 3)


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_lossless_encodings_keep_every_pixel(encoding: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = crop_and_encode(file_of(Image.fromarray(noise)), 32, encoding, 1)
    np.testing.assert_array_equal(pixels_of(data), noise)


def test_jpeg_keeps_full_chroma() -> None:
    stripes = np.zeros((32, 32, 3), dtype=np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255
    data = crop_and_encode(file_of(Image.fromarray(stripes)), 32, "jpeg", 95)
    assert np.abs(pixels_of(data).astype(int) - stripes).mean() < 10, "halved chroma would blend red and blue"


def test_jpeg_follows_quality() -> None:
    small, large = (crop_and_encode(file_of(photo(32, 32)), 32, "jpeg", quality) for quality in (20, 95))
    assert len(small) < len(large)


@pytest.mark.parametrize(("height", "width"), [(64, 100), (100, 64), (64, 101), (64, 64)])
def test_the_largest_centred_square_is_kept(height: int, width: int) -> None:
    """Pixel for pixel, where its side is the resolution."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    top, left = (height - 64) // 2, (width - 64) // 2
    kept = prepared(Image.fromarray(noise), resolution=64)
    np.testing.assert_array_equal(kept, noise[top : top + 64, left : left + 64])


def test_nothing_outside_the_square_leaks_in() -> None:
    image = np.zeros((100, 300, 3), dtype=np.uint8)
    image[:, :100] = image[:, 200:] = 255
    assert prepared(Image.fromarray(image)).max() == 0


def test_shrinking_does_not_alias() -> None:
    """Lines one pixel wide become their mean; sampling without a filter would keep them black or white."""
    lines = np.zeros((256, 256), dtype=np.uint8)
    lines[:, ::2] = 255
    assert np.abs(prepared(Image.fromarray(lines)).astype(int) - 128).max() <= 8


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied_and_invalid_ones_are_ignored(orientation: int) -> None:
    upright = np.zeros((32, 32, 3), dtype=np.uint8)
    upright[:8, :16] = (255, 0, 0)
    upright[8:, :4] = (0, 255, 0)
    turned = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }.get(orientation, lambda a: a)(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turned))
    np.testing.assert_array_equal(prepared(stored, exif=exif), upright)


def test_grey_becomes_three_equal_channels() -> None:
    pixels = prepared(photo(50, 50).convert("L"))
    assert (pixels == pixels[:, :, :1]).all()
    assert pixels.std() > 10


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    for kind in ("PNG", "TIFF", "PPM"):
        pixels = prepared(Image.fromarray(ramp), kind=kind)
        np.testing.assert_array_equal(pixels[:, :, 0], np.round(ramp / 257).astype(np.uint8))


def test_cmyk_palette_and_black_and_white() -> None:
    red = Image.new("RGB", (40, 40), (255, 0, 0))
    assert (prepared(red.convert("CMYK"), kind="TIFF") == (255, 0, 0)).all()
    assert (prepared(red.convert("P"), kind="GIF") == (255, 0, 0)).all()
    assert (prepared(Image.new("1", (40, 40), 1)) == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_lie_on_white(mode: str) -> None:
    black, clear = Image.new("RGBA", (40, 40), (0, 0, 0, 255)), Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    assert (prepared(black.convert(mode)) == 0).all()
    assert (prepared(clear.convert(mode)) == 255).all()


def test_a_transparent_palette_colour_lies_on_white() -> None:
    image = Image.new("P", (40, 40), 3)
    image.putpalette([0, 0, 0] * 256)
    assert (prepared(image, transparency=3) == 255).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is a text file, named .jpg\n", "not an image"),
        (file_of(photo(64, 64), "JPEG")[:-400], "cannot be decoded"),
        (file_of(photo(64, 64), "PNG")[:-400], "cannot be decoded"),
        (file_of(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"), "floating-point"),
        (file_of(Image.fromarray(np.full((8, 8), 70_000, dtype=np.int32)), "TIFF"), "do not fit 16 bits"),
    ],
)
def test_a_damaged_file_raises_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        crop_and_encode(data, 32, "png", 95)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 90}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_decoding_equals_pillow(kind: str, options: dict[str, Any]) -> None:
    data = file_of(photo(48, 48), kind, **options)
    pixels = np.empty((48, 48, 3), dtype=np.uint8)
    decode_into(data, pixels)
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decoding_grey_fills_three_channels(kind: str) -> None:
    pixels = np.empty((48, 48, 3), dtype=np.uint8)
    decode_into(file_of(photo(48, 48).convert("L"), kind), pixels)
    assert (pixels == pixels[:, :, :1]).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [24, 96])
def test_decoding_another_size_is_refused(kind: str, size: int) -> None:
    with pytest.raises(ValueError):
        decode_into(file_of(photo(size, size), kind), np.empty((48, 48, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(24, 96), (96, 24), (49, 48), (500, 500)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_of_another_size_writes_nothing_outside_its_pixels(kind, size):
    memory = np.zeros((50, 48, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=f"the image is {size[1]} x {size[0]} pixels, not 48 x 48"):
        decode_into(file_of(photo(*size), kind), memory[1:49])
    assert not memory[0].any()
    assert not memory[49].any()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decoding_a_truncated_file_is_refused(kind: str) -> None:
    data = file_of(photo(48, 48), kind)
    with pytest.raises(ValueError):
        decode_into(data[: len(data) * 2 // 3], np.empty((48, 48, 3), dtype=np.uint8))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(side: int) -> bytes:
    """A file of some kilobytes that unpacks to side² 16-bit pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 0))
    pixels = zlib.compressobj(9)
    packed = b"".join(pixels.compress(bytes(1 + 6 * side)) for _ in range(side)) + pixels.flush()
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    data = bytearray(file_of(photo(48, 48), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 65_000, 65_000)
    return bytes(data)


def huge_webp() -> bytes:
    data = bytearray(file_of(photo(48, 48), "WEBP", lossless=True, exif=b"Exif\0\0" + bytes(8)))
    place = data.index(b"VP8X") + 12
    data[place : place + 6] = (16_000).to_bytes(3, "little") * 2
    return bytes(data)


@pytest.mark.parametrize("data", [huge_png(4000), huge_jpeg(), huge_webp()], ids=["png", "jpeg", "webp"])
def test_an_image_of_another_size_is_refused_before_its_pixels_take_memory(data: bytes) -> None:
    pixels = np.empty((48, 48, 3), dtype=np.uint8)
    tracemalloc.start()
    before = resident()
    with pytest.raises(ValueError, match="pixels, not 48 x 48|cannot be opened|not an image"):
        decode_into(data, pixels)
    grown, (_, peak) = resident() - before, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(grown, peak) < 2**25


def resident() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM", "EPS", "ICO", "JPEG2000"])
def test_a_stored_image_of_another_format_is_not_decoded(kind: str) -> None:
    """Pillow would run another program for EPS."""
    data = file_of(photo(48, 48), kind)
    with pytest.raises(ValueError, match="not an image in one of the encodings jpeg, png, webp"):
        decode_into(data, np.empty((48, 48, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="not an image in one of the encodings"):
        size_of_stored(data)


@pytest.mark.parametrize("encoding", EXTENSIONS)
def test_the_size_is_read_from_the_header(encoding: str) -> None:
    assert size_of_stored(file_of(photo(70, 100), encoding.upper())) == (100, 70)
