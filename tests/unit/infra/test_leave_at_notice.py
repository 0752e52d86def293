"""A machine's program leaves at the notice of its cloud, and other answers of the cloud do not disturb it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.closed_port import closed_port, url_of
from tests.metadata_server import MetadataServer

AGENT = Path(__file__).resolve().parents[3] / "infra/machines/leave_at_notice.py"
CLOUDS = "aws", "azure", "gcp"

# As `ray start --block`: exit code 1 after SIGTERM. The signal may come while the program still writes "runs": `print`
# of the handler would fail then, and `os.write` does not.
NODE = """
import os, signal, sys
def drain(*_):
    os.write(1, f"drains {os.environ['RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S']}\\n".encode())
    sys.exit(1)
signal.signal(signal.SIGTERM, drain)
os.write(1, b"runs\\n")
while True:
    signal.pause()
"""


class Agent:
    """The agent with its program. `lines` has what both print."""

    def __init__(self, cloud: str, env: dict[str, str], command: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, AGENT, cloud, sys.executable, "-c", command],
            env={**{key: value for key, value in os.environ.items() if not key.startswith("RAY_")}, **env},
            stdout=subprocess.PIPE,
            text=True,
        )

    def until(self, text: str) -> str:
        """Read until a line has `text`, and return this line."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"ended before {text!r}: {lines}")


@contextmanager
def agent(cloud: str, env: dict[str, str], command: str = NODE) -> Iterator[Agent]:
    running = Agent(cloud, env, command)
    try:
        yield running
    finally:
        running.process.terminate()  # and its program
        with running.process:  # reads nothing more
            pass


@pytest.mark.parametrize(("cloud", "drain_s"), [("aws", 100), ("azure", 25), ("gcp", 25)])
def test_a_notice_ends_the_program(cloud, drain_s):
    with MetadataServer(cloud) as server, agent(cloud, server.env) as machine:
        machine.until("runs")
        assert server.asked.wait(60)
        server.give_notice()
        assert "the cloud takes this machine away: " in machine.until("leave_at_notice")
        machine.until(f"drains {drain_s}\n")
        assert machine.process.wait() == 0  # systemd does not start it again


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_server_that_fails_does_not_end_the_program(cloud):
    with MetadataServer(cloud) as server:
        server.broken = (503, "try later")
        with agent(cloud, server.env) as machine:
            assert "HTTP Error 503" in machine.until("no valid answer")
            server.broken = (200, "<html>a proxy</html>")
            assert "HTTP Error" not in machine.until("no valid answer")
            server.broken = None
            machine.until("answers again")
            server.give_notice()
            machine.until("drains")


def test_without_a_server_the_program_runs_to_its_end():
    with closed_port() as held:
        env = {"SAGAN_METADATA_URL": url_of(held)}
        with agent("aws", env, "print('ran'); raise SystemExit(7)") as machine:
            machine.until("ran")
            assert machine.process.wait() == 7


def test_a_token_of_aws_that_has_expired_is_renewed():
    with MetadataServer("aws") as server, agent("aws", server.env) as machine:
        assert server.asked.wait(60)
        server.tokens.clear()
        machine.until("HTTP Error 401")
        machine.until("answers again")
        server.give_notice()
        machine.until("drains")


def test_an_event_of_azure_for_another_machine_or_without_an_end_is_no_notice():
    with MetadataServer("azure") as server:
        server.events = [server.event("Preempt", "machine-4"), server.event("Freeze", server.name)]
        with agent("azure", server.env) as machine:
            assert server.asked.wait(60)
            server.asked.clear()
            assert server.asked.wait(60)
            server.events = [*server.events, server.event("Reboot", "machine-2", server.name)]
            assert "Reboot, not before Mon, 19 Sep" in machine.until("the cloud takes this machine away")
            machine.until("drains")


def test_the_time_of_a_drain_that_is_set_is_kept():
    drain = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "12"}
    with MetadataServer("gcp") as server, agent("gcp", {**server.env, **drain}) as machine:
        machine.until("runs")
        server.give_notice()
        machine.until("drains 12\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_node(number):
    with MetadataServer("aws") as server, agent("aws", server.env) as machine:
        machine.until("runs")
        assert server.asked.wait(60)
        machine.process.send_signal(number)
        machine.until("drains")
        assert machine.process.wait() == 0


def test_a_program_that_was_killed_gives_its_exit_code():
    with MetadataServer("aws") as server, agent("aws", server.env, "import os; os.kill(os.getpid(), 9)") as machine:
        assert machine.process.wait() == 128 + 9  # systemd starts it again


def test_an_unknown_cloud_is_named():
    with agent("aw", {}) as machine:
        assert "'aw'" in machine.until("one of aws, azure, gcp")
        assert machine.process.wait() == 2
