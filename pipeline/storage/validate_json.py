"""Validation of JSON files in storage. Somebody else may have written them.

A value of such a file is used as a path, a size or an index only after it has been validated here.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, Field, StringConstraints, ValidationError

from pipeline.errors import CorruptError
from pipeline.storage import files

MOST_BYTES = 2**24
"""Largest size of a JSON file. Parsed, such a file takes at most about 0.5 GB."""
_DEEPEST = 32  # levels of nesting; a deeper value could exhaust the stack of a recursive function
_LONGEST_PART = 255  # bytes of a file's name, as file systems limit it
_SHOWN = 80  # letters of a foreign text in a message

Parsed = TypeVar("Parsed", bound=BaseModel)


def printable(text: str) -> str:
    """Return a text on one line. Unprintable letters, such as those that control a terminal, are escaped."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _check_part(part: str) -> None:
    """Raise ValueError where `part` is not a plain name of a file."""
    plain = part.isprintable() and not part.startswith(".") and "/" not in part and "\\" not in part
    if not part or not plain or len(part.encode()) > _LONGEST_PART:
        raise ValueError(
            f"a file's name must not lead outside its folder: it must be printable, without slashes and backslashes, "
            f"must not begin with a dot, and must have 1 to {_LONGEST_PART} bytes"
        )


def _plain(name: str) -> str:
    _check_part(name)
    return name


def _relative(path: str) -> str:
    for part in path.split("/"):
        _check_part(part)
    return path


Size = Annotated[int, Field(strict=True, ge=0, le=2**50)]
"""Number of bytes or of samples."""
Sha256 = Annotated[str, StringConstraints(strict=True, pattern="^[0-9a-f]{64}$")]
"""SHA-256 as 64 lower-case hexadecimal digits."""
PlainName = Annotated[str, Field(strict=True), AfterValidator(_plain)]
"""Name of a file directly in its folder, or another name from which files are named."""
RelativePath = Annotated[str, Field(strict=True, max_length=1024), AfterValidator(_relative)]
"""Path of a file below its folder, with `/` between plain names."""


def read(url: str) -> bytes:
    """Return the bytes of a JSON file.

    Raises FileNotFoundError, CorruptError where the file has more than MOST_BYTES, and EnvironmentFault.
    """
    return files.read_at_most(url, MOST_BYTES)


def parse(data: bytes, url: str, what: str) -> dict[str, Any]:
    """Parse the JSON object that was read from `url`. `what` is its kind in messages, such as "a manifest".

    Raises CorruptError where `data` is not JSON, not an object, too large, or nested too deeply.
    """
    try:
        if len(data) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{url} is not {what}: {error or type(error).__name__}") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{url} is not {what}: it is not a JSON object")
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [child for item in level for child in _children(item)]
        if not level:
            return value
    raise CorruptError(f"{url} is not {what}: it is nested deeper than {_DEEPEST} levels")


def validate(model: type[Parsed], values: dict[str, Any], url: str, what: str) -> Parsed:
    """Return the values of a parsed file as a model. Raises CorruptError that names the first wrong field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = printable(".".join(str(part)[:_SHOWN] for part in problem["loc"]))
        reason = printable(problem["msg"].removeprefix("Value error, "))
        raise CorruptError(f"{url} is not {what}: {field}: {reason}") from error


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
