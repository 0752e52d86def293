"""Writes and uploads checkpoints in a thread while training continues. An outage of storage delays an upload only."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import EnvironmentFault, LastingFault
from pipeline.runs.checkpoints import StoredCheckpoint, upload_checkpoint
from pipeline.training.status.messages import Message, Waits, WentOn

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
_LEAVING_S = 30.0  # longest wait at the end for an upload that goes on


class CheckpointUpload:
    """Writes and uploads one checkpoint after another.

    Args:
        tell: Called with messages for the driver.
        require_owner: Called before each upload. Raises LostRun where another driver owns the run.

    Attributes:
        last: The checkpoint that was written last; None before the first one.
    """

    def __init__(self, tell: Callable[[Message], None], require_owner: Callable[[], None]) -> None:
        self._tell, self._require_owner = tell, require_owner
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()
        self._error: Exception | None = None
        self.last: StoredCheckpoint | None = None

    def start(
        self, folder: Path, write: Callable[[], StoredCheckpoint], then: Callable[[StoredCheckpoint], None]
    ) -> None:
        """Call `write` in a thread, upload the files of `folder`, call `then`, and delete `folder`.

        Waits until the previous upload has ended. So at most one checkpoint waits on this machine. Raises what `wait`
        raises.

        Args:
            folder: Local folder of the files.
            write: Writes the files and returns the place of the checkpoint in storage.
            then: Called with the checkpoint when it is complete.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(folder, write, then), name="upload", daemon=True)
        self._thread.start()

    def ended(self, within_s: float) -> bool:
        """Wait at most `within_s` seconds for the last upload, and return whether it has ended."""
        if self._thread is not None:
            self._thread.join(within_s)
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the last upload has ended. Raises its error, unless it was a temporary fault of storage."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait at most 30 s for the upload, and give it up."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(_LEAVING_S)

    def _run(
        self, folder: Path, write: Callable[[], StoredCheckpoint], then: Callable[[StoredCheckpoint], None]
    ) -> None:
        pause = FIRST_PAUSE_S
        try:
            self.last = checkpoint = write()
            who = f"checkpoint {checkpoint.name}"
            while True:
                try:
                    self._require_owner()
                    upload_checkpoint(folder, checkpoint)
                    then(checkpoint)
                except LastingFault:
                    raise
                except EnvironmentFault as error:
                    until = f"it is sent again in {pause:.0f} s; training continues to the next checkpoint"
                    self._tell(Waits(who, f"storage: {error.message}", until))
                    if self._ending.wait(pause):
                        raise
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                else:
                    self._tell(WentOn(who))
                    return
        except Exception as error:
            self._error = error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
