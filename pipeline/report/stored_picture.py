"""Reads the pictures of a run or a sweep, which somebody else may have stored."""

from __future__ import annotations

from PIL import Image

from pipeline.collection.image_codec import decode_image
from pipeline.errors import CorruptError
from pipeline.storage import files

_MOST_BYTES = 2**26


def stored_picture(url: str, width: int) -> Image.Image:
    """Return the picture at `url` in RGB, reduced to at most `width` px.

    Raises FileNotFoundError, CorruptError where it is damaged or too large, and EnvironmentFault.
    """
    try:
        picture = decode_image(files.read_at_most(url, _MOST_BYTES))
    except ValueError as error:
        raise CorruptError(f"{url} is not a picture: {error}", "delete it") from error
    picture.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
    return picture
