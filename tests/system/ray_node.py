"""A further node of a Ray cluster on this machine, which leaves as one of a cloud does; another job that holds CPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE

from infra.local.server_process import Server, free_port
from infra.local.servers import Ray

# `ray start` refuses a second node on loopback: with a cluster allowed, it would use an address of the network.
RAY_ON_LOOPBACK = """
from ray._private import ray_constants, services
from ray.scripts.scripts import main
services.get_node_ip_address = lambda *_: services.get_localhost_ip()
ray_constants.ENABLE_RAY_CLUSTER = True
main()
"""


class RayNode(Server):
    """A node of 127.0.0.1 that joins a head.

    Args:
        head: The head, which runs.
        cpus: Logical CPUs.
        drain_s: Seconds between the notice and the end of the node.
        env: Variables of the node's processes.
    """

    name = "a Ray node"
    passing = Ray.passing

    def __init__(self, head: Ray, cpus: int, drain_s: float = 120.0, env: dict[str, str] | None = None) -> None:
        super().__init__(env={"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(drain_s), **(env or {})})
        self.head, self.cpus = head, cpus

    def command(self) -> list[str]:
        join = ["--address", self.head.env["RAY_ADDRESS"], *self.options()]
        return [sys.executable, "-c", RAY_ON_LOOPBACK, "start", "--block", *join]

    def options(self) -> list[str]:
        """Return the options of `ray start` that make a node of this machine one of several."""
        ports = ["--node-ip-address", "127.0.0.1", "--dashboard-agent-listen-port", str(free_port())]
        ports += ["--min-worker-port", "0", "--max-worker-port", "0"]  # any port; by default, a range of the machine
        size = ["--num-cpus", str(self.cpus), "--object-store-memory", str(100_000_000)]
        return [*ports, *size, "--disable-usage-stats"]

    def environment(self) -> dict[str, str]:
        return self.head.environment()

    def ready(self) -> bool:
        return "Ray runtime started" in self.log.read_text(errors="replace")

    def give_notice(self) -> None:
        """Send SIGTERM to `ray start`, as Kubernetes does."""
        give_notice(self)

    def kill(self) -> None:
        """End all processes of the node at once, without notice."""
        _, *processes = self.pids
        for process in processes:
            with suppress(ProcessLookupError):  # a process of the node may end by itself meanwhile
                os.kill(process, signal.SIGKILL)
        self.wait_for_end()

    def wait_for_end(self) -> None:
        """Wait until the node has left."""
        assert self._guardian is not None
        self._guardian.wait()


# A placement group, since it takes CPUs of several nodes. It ends with its job.
HOLD = """
import sys
import ray
from ray.util.placement_group import placement_group
ray.init(logging_level="ERROR", log_to_driver=False)
ray.get(placement_group([{"CPU": 1}] * int(sys.argv[1])).ready())
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def cpus_in_use(head: Ray, cpus: int) -> Iterator[subprocess.Popen[str]]:
    """Let another job hold that many CPUs of a cluster, until the `with` block or the job's standard input ends."""
    command = [sys.executable, "-c", HOLD, str(cpus)]
    environment = {**os.environ, **head.env}
    with subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True) as job:
        assert job.stdin is not None
        assert job.stdout is not None
        assert job.stdout.readline() == "held\n"
        yield job
        job.stdin.close()


def give_notice(server: Ray | RayNode) -> None:
    """Send SIGTERM to `ray start` of a head or of another node."""
    start = next(pid for pid in server.pids[1:] if b"\0start\0" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(start, signal.SIGTERM)
