"""Paths that begin with the home folder of a user."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UsageError


def expanded(path: Path | str) -> Path:
    """Return a path with the home folder for `~` or `~USER` at its beginning. Raises UsageError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(
            f"{path} is below a home folder, but there is no user {Path(path).parts[0].removeprefix('~')}",
            f"give an absolute path; write ./{path} for a folder of this name",
        ) from None
