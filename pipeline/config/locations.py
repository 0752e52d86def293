"""Locations in a job: paths, URLs and SQLite URIs. They are made absolute, because workers run in other folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator

_LOCAL = re.compile(r"(sqlite(?:\+\w+)?:///|file://|file:)?(.+)", re.DOTALL)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_TRACKERS = ("databricks", "databricks-uc", "uc")  # tracking URIs of MLflow that are names and not paths


def absolute(location: str) -> str:
    """Return a path, a URL or an SQLite URI with an absolute path. Workers run in other folders than the command."""
    match = _LOCAL.fullmatch(location)
    if match is None or (match[1] is None and _URI.match(location)):
        return location
    prefix, path = match[1] or "", match[2]
    if not prefix.startswith("sqlite"):
        return prefix + str(Path(path).expanduser().absolute())
    folder, below = Path.cwd(), path
    if path.startswith("~"):
        home, _, below = path.partition("/")
        folder = Path(home).expanduser()
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


Url = Annotated[str, AfterValidator(absolute)]
TrackingUri = Annotated[str, AfterValidator(absolute_tracking_uri)]
NodePath = Annotated[str, AfterValidator(_absolute_on_each_node)]
