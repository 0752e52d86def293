"""Single images: any image file is encoded as a square RGB image, and a stored image is decoded to pixels."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are decoded, by Pillow's names. Pillow runs other programs for some formats that are not listed."""
MAX_PIXELS = 64_000_000
"""Greatest number of pixels of a source image, where none is given."""
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
"""Extension of an image in a shard, by encoding."""
_STORED = [encoding.upper() for encoding in EXTENSIONS]  # Pillow's names; its other decoders never see a stored image


def crop_and_encode(
    data: bytes,
    resolution: int,
    encoding: str,
    quality: int = 95,
    chroma: str = "4:4:4",
    max_pixels: int = MAX_PIXELS,
) -> bytes:
    """Return an image file as shards hold it: RGB, upright, its largest centred square, resized and encoded.

    Args:
        data: Bytes of an image file of one of the FORMATS.
        resolution: Pixels per side of the result.
        encoding: A key of EXTENSIONS.
        quality: JPEG quality, 1 to 100.
        chroma: JPEG chroma subsampling, 4:4:4 or 4:2:0.
        max_pixels: Greatest number of pixels of the image file.

    Raises ValueError with the reason where `data` is not an image or cannot be decoded completely.
    """
    image = decode_image(data, max_pixels)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # resize(box=…) would let the filter read pixels outside the box, so the image is cropped first. Pillow widens its
    # filter with the scale, which prevents aliasing. At scale 1 the filter keeps every pixel.
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if encoding == "jpeg":
        image.save(out, "JPEG", quality=quality, subsampling=chroma)
    elif encoding == "webp":
        image.save(out, "WEBP", lossless=True)
    else:
        image.save(out, "PNG")
    return out.getvalue()


def size_of_stored(data: bytes) -> tuple[int, int]:
    """Return width and height of a stored image. Only its header is read.

    Raises ValueError where `data` is not an image in an encoding of EXTENSIONS.
    """
    if _is_jpeg(data):
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        return width, height
    with _open_stored(data) as image:
        return image.size


def decode_into(data: bytes, pixels: np.ndarray) -> None:
    """Decode a stored image into `pixels`, a contiguous uint8 array [H, W, 3].

    Somebody else may have stored the image. No memory is allocated for the pixels of an image of another size. Raises
    ValueError where `data` is damaged, has another encoding than those of EXTENSIONS, or another size.
    `pixels` is undefined then.
    """
    height, width, _ = pixels.shape
    if _is_jpeg(data):
        try:
            decoded = simplejpeg.decode_jpeg(data, "RGB", buffer=pixels)  # refuses an image larger than `pixels`
        except ValueError:
            _check_size(size_of_stored(data), (width, height))
            raise
        _check_size((decoded.shape[1], decoded.shape[0]), (width, height))
        return
    with _open_stored(data) as image:
        _check_size(image.size, (width, height))
        try:
            upright = _to_rgb(image)
        except Exception as error:  # for damaged files decoders raise OSError, SyntaxError, struct.error and others
            raise ValueError(f"cannot be decoded: {error}") from error
    _check_size(upright.size, (width, height))
    pixels[:] = np.asarray(upright)


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def _open_stored(data: bytes) -> Image.Image:
    """Open a stored image without decoding it. Raises ValueError."""
    try:
        return Image.open(io.BytesIO(data), formats=_STORED)
    except UnidentifiedImageError:
        raise ValueError(f"not an image in one of the encodings {', '.join(EXTENSIONS)}") from None
    except Exception as error:  # as in `decode_into`
        raise ValueError(f"cannot be opened: {error}") from error


def _check_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    if size != expected:
        raise ValueError(f"the image is {size[0]} x {size[1]} pixels, not {expected[0]} x {expected[1]}")


def image_size(data: bytes) -> tuple[int, int]:
    """Return width and height of an image file without decoding its pixels. Raises ValueError with the reason."""
    with _opened(data) as image:
        return image.size


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a whole image file to 8-bit RGB, upright.

    Raises ValueError with the reason. The number of pixels is checked before memory is taken for them.
    """
    image = _opened(data)
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"the image has {image.width} x {image.height} pixels, more than max_pixels allows ({max_pixels:,})"
        )
    try:
        image.load()
        return _to_rgb(image)
    except Exception as error:  # for damaged files decoders raise OSError, SyntaxError, struct.error and others
        raise ValueError(f"cannot be decoded: {error}") from error


def _opened(data: bytes) -> Image.Image:
    """Read the header of an image file of one of the FORMATS. Raises ValueError with the reason."""
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("not an image but a pointer of Git LFS; `git lfs pull` gets the image")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"not an image of a format that can be read: {', '.join(FORMATS)}") from None
    except Exception as error:
        raise ValueError(f"cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to upright 8-bit RGB. Transparent pixels become white, and 16-bit grey is scaled to 8 bits.

    Raises ValueError for values of unknown range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow may hold in 32 bits
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"pixel values from {wide.min()} to {wide.max()} do not fit 16 bits")
        narrow = np.empty(wide.shape, dtype=np.uint8)
        for row, values in zip(narrow, wide, strict=True):  # row by row, since a sum of 32 bits takes twice the memory
            row[:] = (values.astype(np.uint32) + 128) // 257
        image = Image.fromarray(narrow)
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
