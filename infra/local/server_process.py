"""A program that serves on a loopback port while a `with` block runs. `end_with_parent.py` ends the program."""

from __future__ import annotations

import os
import random
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

from infra.local import end_with_parent
from pipeline.errors import EnvironmentFault

CHECKOUT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent  # folder with the programs ray, mlflow and rclone of this environment
# The first line of a job file runs `python`. With this PATH, it is the `python` of this environment.
PATH = f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


class Server(ABC):
    """One program that ends with its parent. Subclasses define its command and when it is ready."""

    name: str
    starting_s = 120.0  # longest silence at the start; a start usually takes seconds, and longer on a busy machine
    leaving_s = 30.0  # time limit for the end; Ray needs up to 20 s
    passing: tuple[str, ...] = ("in use",)  # what the output says, in lower case, where another start may succeed

    def __init__(self, *, port: int | None = None, env: dict[str, str] | None = None) -> None:
        """Prepare a server, which `with` starts.

        Args:
            port: Port to listen on; None chooses a free port.
            env: Variables that are added to the program's environment.
        """
        self._fixed = port
        self._env = env or {}
        self.port = 0
        self._guardian: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """Return the program and its arguments. `self.port` is set before the call."""

    def environment(self) -> dict[str, str]:
        """Return environment variables that this kind of program needs."""
        return {}

    @abstractmethod
    def ready(self) -> bool:
        """Return whether the program answers. The method is called repeatedly until it returns true."""

    def __enter__(self) -> Self:
        """Start the program and wait until it answers.

        Raises EnvironmentFault where it does not answer. The message contains the last lines of its output.
        """
        # The path must be short, because the paths of Ray's sockets are below it and have a limit.
        self._folder = tempfile.TemporaryDirectory(prefix="sagan-", dir="/tmp")
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
        if self._guardian:
            self._guardian.terminate()
            self._guardian.wait()
            self._guardian = None
        self._folder.cleanup()

    @property
    def scratch(self) -> Path:
        """A folder that exists while the server runs."""
        return Path(self._folder.name)

    @property
    def pids(self) -> list[int]:
        """Ids of the guardian process and of all processes below it."""
        return [self._guardian.pid, *end_with_parent.descendants(self._guardian.pid)] if self._guardian else []

    def _start(self) -> None:
        if self._fixed and taken(self._fixed):
            raise EnvironmentFault(
                f"port {self._fixed} of 127.0.0.1 is taken; {self.name} cannot listen on it",
                "end the program that listens on this port, choose another port, or give no port to use a free one",
            )
        for _ in range(5):  # another program may take a free port before the server listens on it
            self.port = self._fixed or free_port()
            self._launch()
            if self._wait():
                return
            log = self.log.read_text(errors="replace").lower()
            if not any(reason in log for reason in self.passing):
                break
        raise EnvironmentFault(
            f"{self.name} did not start. The last lines of its output are:\n{self._last_lines()}",
            "correct the problem that the output names, then start it again",
        )

    def _launch(self) -> None:
        """Start the guardian process, which starts the program."""
        guardian_arguments = (str(os.getpid()), str(self.scratch), str(self.leaving_s))
        with self.log.open("wb") as log:
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", end_with_parent.__file__, *guardian_arguments, *self.command()],
                cwd=CHECKOUT,
                env=os.environ | {"PATH": PATH} | self.environment() | self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must not reach the servers, because the owner ends them in order
            )

    def _wait(self) -> bool:
        """Wait until the program answers. Return False if it ends before that.

        Raises EnvironmentFault where the program neither answers nor writes a line for `starting_s` seconds.
        """
        assert self._guardian
        written, deadline = 0, time.monotonic() + self.starting_s
        while time.monotonic() < deadline:
            if (size := self.log.stat().st_size) != written:
                written, deadline = size, time.monotonic() + self.starting_s
            if self._guardian.poll() is not None:
                return False
            if self.ready():
                return True
            time.sleep(0.05)
        raise EnvironmentFault(
            f"{self.name} neither answered nor wrote a line for {self.starting_s:.0f} s. "
            f"The last lines of its output are:\n{self._last_lines()}",
            "check whether the machine is overloaded, then start it again",
        )

    def _last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def free_port() -> int:
    """Return a free port of 127.0.0.1 that the kernel does not give to connections.

    A server listens seconds after its port was chosen. Until then a connection of another program could take a port of
    the kernel's range.
    """
    kernels = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(kernels.read_text().split()[0]) if kernels.exists() else 32768
    least = 20_000  # Ray gives the ports below to its workers
    beyond = (
        first if first >= least + 1000 else 65_536
    )  # where the kernel's range leaves too few ports, all may be taken
    while taken(port := random.randrange(least, beyond)):  # noqa: S311  # not a secret
        pass
    return port


def taken(port: int) -> bool:
    """Return whether a program listens on the port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def answers(url: str, headers: dict[str, str] | None = None) -> bool:
    """Return whether an HTTP server on this machine answers. The request uses no proxy."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(url, headers=headers or {})  # noqa: S310 - http:// of a server of this package
        with direct.open(request, timeout=2):
            return True
    except OSError:
        return False
