"""One image: from whatever file it came in to the square RGB that is stored, and from there into a batch."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

# Extension in shards, by encoding.
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}


def prepare(data: bytes, resolution: int, encoding: str, quality: int = 95, chroma: str = "4:4:4") -> bytes:
    """An image file as shards hold it: RGB, upright, its largest centred square, `resolution` pixels a side.

    `encoding` is a key of EXTENSIONS; `quality` (1 … 100) and `chroma` (4:4:4, 4:2:0) are JPEG's. Raises ValueError
    with the reason where `data` is not an image that can be decoded to its end.
    """
    image = _decode(data)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first, since resize(box=…) lets the filter look outside the box. Pillow widens its filter with the scale,
    # so that nothing aliases; at scale 1 it keeps every pixel.
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


def decode_into(data: bytes, pixels: np.ndarray) -> None:
    """Decode a stored image into `pixels`, uint8 [H, W, 3], contiguous.

    Raises ValueError where `data` is damaged or has another size: then `pixels` may hold anything.
    """
    if data[:3] == b"\xff\xd8\xff":
        shape = simplejpeg.decode_jpeg(data, "RGB", buffer=pixels).shape
    else:
        decoded = np.asarray(_decode(data))
        shape = decoded.shape
        if shape == pixels.shape:
            pixels[:] = decoded
    if shape != pixels.shape:  # simplejpeg fills a part of the buffer where the image is smaller
        raise ValueError(f"the image is {shape[1]} x {shape[0]} pixels, not {pixels.shape[1]} x {pixels.shape[0]}")


def _decode(data: bytes) -> Image.Image:
    """The image to its end, as 8-bit RGB, upright. Raises ValueError with the reason."""
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return _to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError("not an image, or of a kind that Pillow does not know") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others at damaged files
        raise ValueError(f"cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Transparent pixels lie on white; 16-bit grey is scaled. Raises ValueError for values of unknown range."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, also where Pillow keeps it in 32 bits
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"values from {wide.min()} to {wide.max()} are neither 8 nor 16 bit")
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("the range of floating-point values is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
