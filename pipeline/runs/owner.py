"""The owner of a run or of a sweep: at most one driver commits to its folder.

A driver becomes the owner by creating the next object `owners/<number>.json`, which only one driver can create. It
renews `owners/<number>.alive` while it lives. A later driver takes over where the owner has ended, or where it has not
been renewed for a minute by the clock of the storage. An owner that finds a higher number stops at once.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline.errors import CorruptError, EnvironmentFault, SaganError, UsageError
from pipeline.storage import files, validate_json
from pipeline.storage.validate_json import Size, printable

RENEWAL_S = 15.0
TAKEOVER_S = 60.0  # an owner that was not renewed for so long is dead
_POLL_S = 1.0
_WHAT = "the record of a run's owner"


class Owner(BaseModel):
    """`owners/<number>.json`: the process that owns the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str
    boot: str
    """Id of the machine's start, since a process id is used again after it."""
    pid: Size
    process_start: str
    """Start of the process in clock ticks of the machine, since a process id is used again."""
    token: str
    """Random text that makes the record unique."""

    @classmethod
    def this_process(cls) -> Owner:
        return cls(
            host=socket.gethostname(),
            boot=_boot(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()),
            token=secrets.token_hex(8),
        )

    def has_died(self) -> bool:
        """Return whether the process was on this machine and does not exist any more."""
        here = (self.host, self.boot) == (socket.gethostname(), _boot())
        return here and self.process_start != _process_start(self.pid)


class LostRun(SaganError):
    """Another driver has taken the run over. This driver must not touch the run's folder any more."""


class Ownership:
    """The ownership of a run, which `claim` returns. A thread renews it until `release`."""

    def __init__(self, folder: str, number: int) -> None:
        self._folder, self.number = folder, number
        self._lost = self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._renew_until_the_end, name="owner", daemon=True)
        self._renew()
        self._thread.start()

    def require(self) -> None:
        """Raise LostRun where another driver is known to own the run. The call does not wait for storage."""
        if self._lost:
            raise lost_run(self._folder)

    def release(self) -> None:
        """Give the run back, so that another driver need not wait."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(RENEWAL_S)
        if not self._lost:
            with suppress(EnvironmentFault):
                files.write_json(_alive(self._folder, self.number), {"released": True})

    def _renew(self) -> None:
        files.write_json(_alive(self._folder, self.number), {"released": False})

    def _renew_until_the_end(self) -> None:
        while not self._lost:
            with self._changed:
                if self._changed.wait_for(lambda: self._ended, RENEWAL_S):
                    return
            with suppress(EnvironmentFault):  # storage is away: nobody can take over either
                self._lost = newest_owner(self._folder) != self.number
                if not self._lost:
                    self._renew()


def claim(folder: str, note: Callable[[str], None], what: Literal["run", "sweep"] = "run") -> Ownership:
    """Become the owner of the run or the sweep whose owners are in the folder `folder`.

    Waits for an owner that may be dead, at most a minute, and calls `note` with a line that says so. Raises UsageError
    where another driver is training the run, and EnvironmentFault.
    """
    while True:
        newest = newest_owner(folder)
        if newest is not None:
            _wait_for_end(folder, newest, note, what)
        number = (newest or 0) + 1
        record = Owner.this_process().model_dump_json().encode()
        if files.create(_record(folder, number), record):
            ownership = Ownership(folder, number)
            for old in range(max(1, number - 3), number):
                files.delete(_record(folder, old))
                files.delete(_alive(folder, old))
            return ownership


def newest_owner(folder: str) -> int | None:
    """Return the number of the newest owner; None where the run has had none. Raises EnvironmentFault."""
    stems = [name.removesuffix(".json") for name in files.list_names(folder) if name.endswith(".json")]
    return max((int(stem) for stem in stems if stem.isdecimal() and len(stem) == _DIGITS), default=None)


class OwnerSeen(BaseModel):
    """What a reader of a run's folder sees of the run's newest owner."""

    model_config = ConfigDict(frozen=True)

    number: int
    host: str | None
    """Machine of the driver; None where its record is not valid."""
    pid: int | None
    age_s: float
    """Seconds since the owner was renewed, by the clock of this machine."""
    alive: bool
    """Whether the driver seems to run: it has not released the run, and was renewed less than a minute ago."""


def look_at_owner(folder: str) -> OwnerSeen | None:
    """Return the newest owner of a run without changing anything; None where the run has had none.

    Raises EnvironmentFault.
    """
    if (number := newest_owner(folder)) is None:
        return None
    owner, age = _read(folder, number), max(0.0, time.time() - _renewed_at(folder, number))
    gone = _is_released(folder, number) or (owner is not None and owner.has_died())
    return OwnerSeen(
        number=number,
        host=owner and owner.host,
        pid=owner and owner.pid,
        age_s=age,
        alive=not gone and age < TAKEOVER_S,
    )


def require_owner(folder: str, number: int) -> None:
    """Raise LostRun where owner `number` is not the newest one. Raises EnvironmentFault."""
    if newest_owner(folder) != number:
        raise lost_run(folder)


def lost_run(folder: str) -> LostRun:
    return LostRun(
        f"another driver has taken over the run of {folder}; this one ends and leaves the run's folder alone",
        "nothing has to be done; look at the output of the other driver",
    )


_DIGITS = 8


def _record(folder: str, number: int) -> str:
    return files.join(folder, f"{number:0{_DIGITS}d}.json")


def _alive(folder: str, number: int) -> str:
    return files.join(folder, f"{number:0{_DIGITS}d}.alive")


def _wait_for_end(folder: str, number: int, note: Callable[[str], None], what: str) -> None:
    """Wait until the owner has ended or died. Raises UsageError where it is alive."""
    owner = _read(folder, number)
    if owner is not None and owner.has_died():
        return
    first, said = _renewed_at(folder, number), False
    while not _is_released(folder, number) and newest_owner(folder) == number:
        renewed = _renewed_at(folder, number)
        if renewed != first and not _is_released(folder, number):
            who = f"process {owner.pid} on {printable(owner.host)}" if owner else "another process"
            raise UsageError(
                f"{who} is training this {what} ({folder})",
                f"wait for it, or stop it and run the same command again; or give this {what} another name (name=…)",
            )
        age = _storage_time(folder) - renewed
        if age > TAKEOVER_S:
            return
        if not said:
            left = TAKEOVER_S - age
            note(f"waiting at most {left:.0f} s for the {what}'s last driver, which was alive {age:.0f} s ago")
            said = True
        time.sleep(_POLL_S)


def _read(folder: str, number: int) -> Owner | None:
    url = _record(folder, number)
    try:
        return validate_json.validate(Owner, validate_json.parse(validate_json.read(url), url, _WHAT), url, _WHAT)
    except (FileNotFoundError, CorruptError):
        return None


def _is_released(folder: str, number: int) -> bool:
    url = _alive(folder, number)
    try:
        return bool(validate_json.parse(validate_json.read(url), url, _WHAT).get("released"))
    except (FileNotFoundError, CorruptError):
        return False


def _renewed_at(folder: str, number: int) -> float:
    """Return when the owner was last renewed, in seconds by the clock of the storage."""
    for url in (_alive(folder, number), _record(folder, number)):
        with suppress(FileNotFoundError):
            return files.modified(url)
    return 0.0


def _storage_time(folder: str) -> float:
    """Return the time of the storage's clock in seconds."""
    probe = files.join(folder, f"{secrets.token_hex(8)}.probe")
    files.write_bytes(probe, b"")
    try:
        return files.modified(probe)
    finally:
        files.delete(probe)


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _process_start(pid: int) -> str:
    """Return when a process of this machine started, in clock ticks; "" where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
