"""A program that serves on a loopback port for as long as a `with` block lasts; see `leash.py` for how it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

from infra.local import leash
from pipeline.errors import EnvironmentFault

CHECKOUT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent  # where this environment's ray, mlflow and rclone are
# This environment's programs come first, so that `python` in a job file's first line is this one.
PATH = f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


class Server(ABC):
    """One program under a leash. Subclasses say what to run and when it is ready."""

    name: str
    starting_s = 120.0  # seconds usually; more where the machine is busy
    leaving_s = 30.0  # Ray needs up to 20 s

    def __init__(self, *, port: int | None = None, env: dict[str, str] | None = None) -> None:
        """`port`: the one to listen on, or None for any that is free. `env`: added to the program's environment."""
        self._fixed = port
        self._env = env or {}
        self.port = 0
        self._leash: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """The program and its arguments; `port` is known."""

    def environment(self) -> dict[str, str]:
        """What this kind of program needs in its environment."""
        return {}

    @abstractmethod
    def ready(self) -> bool:
        """Whether it answers. Asked again and again until it does."""

    def __enter__(self) -> Self:
        """Start and wait until it answers. Raises EnvironmentFault where it does not, with its last words."""
        self._folder = tempfile.TemporaryDirectory(prefix="sagan-", dir="/tmp")  # short: Ray's sockets are below it
        self.log = Path(self._folder.name) / f"{type(self).__name__}.log"
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _at: TracebackType | None
    ) -> None:
        if self._leash:
            self._leash.terminate()
            self._leash.wait()
            self._leash = None
        self._folder.cleanup()

    @property
    def scratch(self) -> Path:
        """A folder that lives as long as the server."""
        return Path(self._folder.name)

    @property
    def pids(self) -> list[int]:
        """The leash and everything on it."""
        return [self._leash.pid, *leash.descendants(self._leash.pid)] if self._leash else []

    def _start(self) -> None:
        if self._fixed and taken(self._fixed):
            raise EnvironmentFault(
                f"port {self._fixed} of 127.0.0.1 is taken, {self.name} cannot listen on it",
                "end what listens there, choose another port, or leave the choice to us",
            )
        for _ in range(5):  # a port that was free may be somebody else's by the time the server asks for it
            self.port = self._fixed or free_port()
            self._launch()
            if self._wait():
                return
            if "in use" not in self.log.read_text(errors="replace").lower():
                break
        raise EnvironmentFault(f"{self.name} did not start:\n{self._last_words()}", "see what it says above")

    def _launch(self) -> None:
        leashed = (str(os.getpid()), str(self.scratch), str(self.leaving_s))
        with self.log.open("wb") as log:
            self._leash = subprocess.Popen(
                [sys.executable, "-I", leash.__file__, *leashed, *self.command()],
                cwd=CHECKOUT,
                env=os.environ | {"PATH": PATH} | self.environment() | self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; we end our servers in order
            )

    def _wait(self) -> bool:
        """True once it answers, False if it ended instead."""
        assert self._leash
        deadline = time.monotonic() + self.starting_s
        while time.monotonic() < deadline:
            if self._leash.poll() is not None:
                return False
            if self.ready():
                return True
            time.sleep(0.05)
        raise EnvironmentFault(
            f"{self.name} did not answer within {self.starting_s:.0f} s:\n{self._last_words()}",
            "is the machine overloaded?",
        )

    def _last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def answers(url: str, headers: dict[str, str] | None = None) -> bool:
    """Whether an HTTP server on this machine answers, without the help of a proxy."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url, headers=headers or {}), timeout=2):
            return True
    except OSError:
        return False
