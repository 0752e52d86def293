"""Locations in a job: paths, URLs and SQLite URIs. They are made absolute, because workers run in other folders."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator

from pipeline.errors import UsageError
from pipeline.storage.home_folders import expanded

_LOCAL = re.compile(r"(sqlite(?:\+\w+)?:///|file://|file:)?(.+)", re.DOTALL)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_TRACKERS = ("databricks", "databricks-uc", "uc")  # tracking URIs of MLflow that are names and not paths


def absolute(location: str) -> str:
    """Return a path, a URL or an SQLite URI with an absolute path. Workers run in other folders than the command.

    Raises UsageError where the path is below the home folder of a user who does not exist.
    """
    match = _LOCAL.fullmatch(location)
    if match is None or (match[1] is None and _URI.match(location)):
        return location
    prefix, path = match[1] or "", match[2]
    if not prefix.startswith("sqlite"):
        return prefix + str(expanded(path).absolute())
    folder, below = Path.cwd(), path
    if path.startswith("~"):
        home, _, below = path.partition("/")
        folder = expanded(home)
    return prefix + str(Path(_quoted(folder), below))


def sqlite_uri(database: Path) -> str:
    """Return the URI of an SQLite database."""
    return f"sqlite:///{_quoted(database)}"


def sqlite_database(uri: str) -> Path | None:
    """Return the path of the database of an SQLite URI; None for another URI."""
    scheme, _, path = uri.partition(":///")
    return Path(unquote(path.partition("?")[0])) if scheme.partition("+")[0] == "sqlite" else None


def _quoted(path: Path) -> str:
    """Return a path as a part of an SQLite URI, in which `%` begins an escape and `?` begins parameters."""
    return str(path).replace("%", "%25").replace("?", "%3F")


def absolute_tracking_uri(uri: str) -> str:
    """Return an MLflow tracking URI with an absolute path."""
    return uri if uri in _TRACKERS else absolute(uri)


def _absolute_on_each_node(path: str) -> str:
    """Return an absolute path, or a path below the home folder, which each node expands for itself."""
    return path if path.startswith("~") else absolute(path)


def validator_of(absolute_of: Callable[[str], str]) -> AfterValidator:
    """Return a validator that replaces a location by its absolute form. pydantic names the key of a ValueError."""

    def validated(location: str) -> str:
        try:
            return absolute_of(location)
        except UsageError as error:
            raise ValueError(error.message) from None

    return AfterValidator(validated)


Url = Annotated[str, validator_of(absolute)]
TrackingUri = Annotated[str, validator_of(absolute_tracking_uri)]
NodePath = Annotated[str, validator_of(_absolute_on_each_node)]
