"""Temporary folders of processes that may be killed. The next process deletes the folders of dead ones."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "sagan-"
_OWNER = ".owner"  # a file that the owner locks. The kernel releases the lock when the owner dies


class ScratchFolder:
    """A temporary folder of this process.

    Creating a folder first deletes all such folders of this user whose processes are dead.

    Args:
        purpose: Part of the folder's name.

    Attributes:
        path: The folder.
    """

    def __init__(self, purpose: str) -> None:
        _delete_abandoned(Path(tempfile.gettempdir()))
        made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}{purpose}-"))
        self._lock = os.open(made / _OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = made.rename(made.with_name(made.name.removeprefix(".")))  # once it is locked, others may see it

    def delete(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def delete_if_empty(self) -> None:
        """Delete the folder unless it has files that somebody still reads."""
        if [path.name for path in self.path.iterdir()] == [_OWNER]:
            self.delete()


def _delete_abandoned(parent: Path) -> None:
    """Delete this user's scratch folders in `parent` whose owners are dead."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another process deletes it too, or it has no owner yet
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            lock = os.open(folder / _OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
