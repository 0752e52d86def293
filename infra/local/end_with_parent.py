"""Runs a server that cannot outlive its owner: `python end_with_parent.py OWNER_PID SCRATCH PATIENCE_S COMMAND …`.

The guardian is the process of this file. It uses the standard library only. The owner ends the guardian with SIGTERM.
If the owner is killed, the guardian notices this within half a second and also removes the scratch folder. In both
cases, the guardian sends SIGTERM to the server and waits for at most PATIENCE_S seconds. Then it sends SIGKILL to the
server and to all its descendants, in all sessions and process groups. Ray starts its processes in separate process
groups.
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
    """Run the server until it ends, the owner sends SIGTERM, or the owner dies. Return the server's exit code."""
    owner, scratch, patience_s, command = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4:]
    leaving = False

    def leave(*_: object) -> None:
        nonlocal leaving
        leaving = True

    def watch(*_: object) -> None:
        if os.getppid() != owner:
            leave()

    if sys.platform == "linux":  # orphaned descendants of the server become children of this process
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGALRM, watch)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    server = subprocess.Popen(command, start_new_session=True)
    while not leaving and server.returncode is None:
        # Wait for SIGCHLD, SIGTERM or the timer. The timer also covers a signal that arrives just before this line.
        signal.pause()
        reap(server)
    end(server, patience_s)
    if os.getppid() != owner:
        shutil.rmtree(scratch, ignore_errors=True)  # the owner is dead and cannot remove it
    return server.returncode or 0


def end(server: subprocess.Popen[bytes], patience_s: float) -> None:
    """Send SIGTERM to the server. After `patience_s` seconds, send SIGKILL to all its processes that still run.

    Returns when no process runs any more.
    """
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
    """Return the ids of all running descendants of a process, from Linux's /proc."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # the process has ended in the meantime
            continue
        if state != "Z":
            below.setdefault(int(parent), []).append(int(stat.parent.name))
    family = list(below.get(ancestor, []))
    for pid in family:  # the list grows during the iteration
        family.extend(below.get(pid, []))
    return family


def _group(server: subprocess.Popen[bytes]) -> list[int]:
    """Return the negative id of the server's process group, or [] where the group has ended.

    It replaces `descendants` on systems without /proc. `os.kill` accepts the negative id.
    """
    try:
        os.killpg(server.pid, 0)
    except ProcessLookupError:
        return []
    return [-server.pid]


def reap(server: subprocess.Popen[bytes]) -> None:
    """Reap all children that have ended.

    An orphan that is left as a zombie looks alive, and `ray job stop` would wait for it.
    """
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == server.pid:
                server.returncode = os.waitstatus_to_exitcode(ended[1])


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
