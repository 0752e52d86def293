"""The folder that `sagan pull` writes. A pull replaces files of an earlier pull and never touches other files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import CorruptError, EnvironmentFault, UsageError
from pipeline.storage import files, validate_json
from pipeline.storage.validate_json import RelativePath

LIST = ".pulled.json"  # paths of the files that pulls wrote, relative to the folder
_PATHS = TypeAdapter(list[RelativePath])
_TEMPORARY = ".pull-"  # prefix of folders with incomplete downloads


def require_empty(folder: Path) -> None:
    """Check that nothing is in the way of a new folder. Raises UsageError where `folder` is a file or not empty."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "give the path of a folder")
    if _entries(folder):
        raise UsageError(f"{folder} is not empty", "choose another folder")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a path for a download. When the `with` block ends, its files replace those of an earlier pull in `folder`.

    Where the block raises, `folder` stays as it was. Raises UsageError, before the block, where `folder` holds files
    and none is from an earlier pull; and after it, where a file that is not from an earlier pull is in the way.
    """
    folder = folder.expanduser().resolve()
    if not (folder / LIST).exists():
        require_empty(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the folder, because it may be a mount and its parent may not be writable.
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as temp:
            download = Path(temp) / "files"
            yield download
            _replace(folder, download)
    except OSError as error:
        raise EnvironmentFault(f"{folder} cannot be written: {error}", "choose another folder") from error
    finally:
        if is_new and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def _replace(folder: Path, download: Path) -> None:
    """Move the files of `download` to `folder`, and delete files of the earlier pull that it does not have.

    Every moment leaves a folder that the next pull can replace.
    """
    earlier = _listed(folder / LIST)
    new = {path.relative_to(download).as_posix() for path in download.rglob("*") if path.is_file()}
    if outside := [
        name for name in sorted(earlier | new) if not (folder / name).parent.resolve().is_relative_to(folder)
    ]:
        raise UsageError(f"{folder / outside[0]} is not in {folder}, but behind a link", "choose another folder")
    if foreign := sorted(name for name in new - earlier if (folder / name).exists()):
        raise UsageError(
            f"{folder} holds files that no pull wrote and that the model has too: {', '.join(foreign)}",
            "move these files away, or choose another folder",
        )
    _write_list(folder, earlier | new)
    for name in sorted(new):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (download / name).replace(folder / name)
    for name in earlier - new:
        (folder / name).unlink(missing_ok=True)
    _write_list(folder, new)


def _listed(path: Path) -> set[str]:
    """Return the paths of the files that earlier pulls wrote. Somebody else may have written the list.

    Raises CorruptError where it is no list of paths below the folder.
    """
    try:
        return set(_PATHS.validate_json(files.read_at_most(str(path), validate_json.MOST_BYTES)))
    except FileNotFoundError:
        return set()
    except ValidationError as error:
        reason = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise CorruptError(f"{path} is not the list of an earlier pull: {reason}", "choose another folder") from error


def _write_list(folder: Path, names: set[str]) -> None:
    temp = folder / f"{LIST}.part"
    temp.write_text(json.dumps(sorted(names), indent=1))
    temp.replace(folder / LIST)


def _entries(folder: Path) -> list[Path]:
    """Return the entries of a folder without the downloads that a killed pull left; [] where there is no folder."""
    return [path for path in folder.iterdir() if not path.name.startswith(_TEMPORARY)] if folder.exists() else []
