"""Runs a server that cannot outlive its owner: `python leash.py OWNER_PID SCRATCH PATIENCE_S COMMAND …`.

Standard library only. The owner ends it with SIGTERM. Where the owner is killed and cannot, the leash notices within
half a second, and removes the scratch folder too. Either way the server gets SIGTERM, then a while to leave, and
whatever of it is left gets SIGKILL: its children and their children too, in whichever sessions they hide (Ray starts
its processes in groups of their own).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    owner, scratch, patience_s, command = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4:]
    leaving = False

    def leave(*_: object) -> None:
        nonlocal leaving
        leaving = True

    def watch(*_: object) -> None:
        if os.getppid() != owner:
            leave()

    if sys.platform == "linux":  # orphans of the server become ours, so that none is lost from sight
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGALRM, watch)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    server = subprocess.Popen(command, start_new_session=True)
    while not leaving and server.returncode is None:
        signal.pause()  # until a child's end, our owner's word or the clock, which also covers a signal just before
        reap(server)
    end(server, patience_s)
    if os.getppid() != owner:
        shutil.rmtree(scratch, ignore_errors=True)  # what the owner would have done
    return server.returncode or 0


def end(server: subprocess.Popen[bytes], patience_s: float) -> None:
    """SIGTERM to the server, patience for everybody, SIGKILL for who is still there."""
    if server.returncode is None:
        server.terminate()
    deadline = time.monotonic() + patience_s
    while family := descendants(os.getpid()) if Path("/proc/self/stat").exists() else _group(server):
        if time.monotonic() > deadline:
            for pid in family:
                _kill(pid)
        time.sleep(0.05)
        reap(server)


def descendants(ancestor: int) -> list[int]:
    """Every process below `ancestor` that still runs, by Linux's /proc."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if state != "Z":
            below.setdefault(int(parent), []).append(int(stat.parent.name))
    family = list(below.get(ancestor, []))
    for pid in family:  # grows while it is walked
        family.extend(below.get(pid, []))
    return family


def _group(server: subprocess.Popen[bytes]) -> list[int]:
    """Elsewhere: the server's process group, as the negative id that signals it."""
    try:
        os.killpg(server.pid, 0)
    except ProcessLookupError:
        return []
    return [-server.pid]


def reap(server: subprocess.Popen[bytes]) -> None:
    """Take in whoever ended. An orphan left as a zombie looks alive, and `ray job stop` would wait for it in vain."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == server.pid:
                server.returncode = os.waitstatus_to_exitcode(ended[1])


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
