"""Drive `python -m pipeline` as its users do: as a process with a terminal's output, signals and an exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.runs.score_protocol import Score
from tests.progress_timeout import progress_seen

JOBS = Path(__file__).parents[2] / "jobs"

# The quickstart with networks and counts so small that a run is mostly Ray starting its workers. Spectral norm is on
# both networks, as in the method. The quickstart has none on its generator.
TINY = {
    "model.spectral_norm_g": True,
    "model.z_dim": 64,
    "model.channels_g": 4,
    "model.channels_d": 4,
    "model.multipliers_g": "[4,4,4,4]",
    "model.multipliers_d": "[2,2,2,2]",
    "train.kimg": 1.6,
    "train.log_kimg": 0.032,  # every step, so that no point averages over an interruption
    "checkpoint.kimg": 0.32,
    "evaluate.kimg": 100,
    "evaluate.samples": 64,
    "evaluate.standing_images": 32,
    "evaluate.grid": 20,
}


_begun: list[Driver] = []


def end_drivers() -> None:
    """End the drivers that a failed test has left and close their outputs: they would disturb the next test."""
    for driver in _begun:
        if driver.process.poll() is None:
            driver.process.kill()
        driver.end()
    _begun.clear()


class Driver:
    """One `sagan run`, by default of the tiny quickstart."""

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str],
        *,
        command: Sequence[str] = (sys.executable, "-m", "pipeline", "run"),
        job: Path = JOBS / "quickstart.yaml",
        tiny: bool = True,
        **overrides: Any,
    ) -> None:
        self.folder = folder
        arguments = [f"{key}={value}" for key, value in {**(TINY if tiny else {}), **overrides}.items()]
        self.process = subprocess.Popen(
            [*command, str(job), *arguments],
            cwd=folder,
            env={**os.environ, **environment, "PYTHONPATH": str(JOBS.parent), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        _begun.append(self)

    def until(self, text: str) -> str:
        """Read until a line holds `text`; that line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            progress_seen()
            self.output += line
            if text in line:
                return line
        raise AssertionError(f"the run ended before {text!r}:\n{self.output}")

    def end(self) -> int:
        """Read to the end; the exit code."""
        assert self.process.stdout is not None
        if not self.process.stdout.closed:
            with self.process.stdout as output:
                for line in output:
                    progress_seen()
                    self.output += line
        return self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def summary(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.folder / "runs" / name / "summary.json").read_text())
        return value


def score_key(score: dict[str, Any]) -> str:
    """Name in the tracker of the metric that ranks, of a summary's score: `fid/3fa9c1d2`."""
    return Score(**score).key


def training_workers(cluster: str) -> list[int]:
    """Process ids of Ray Train's workers on this machine that have begun to train, of the cluster at HOST:PORT."""
    return ray_workers("RayTrainWorker", cluster)


def ray_workers(actor: str, cluster: str) -> list[int]:
    """Process ids of this machine's actors of a class, of the cluster at HOST:PORT; there may be other clusters."""
    return [pid for pid, title in _ray_processes(cluster).items() if title.startswith(f"ray::{actor}")]


def left_over(cluster: str) -> list[str]:
    """Titles of the processes on this machine that belong to some run, of the cluster at HOST:PORT."""
    of_the_cluster = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_AutoscalingCoordinatorActor")
    return [title for title in _ray_processes(cluster).values() if not title.startswith(of_the_cluster)]


def _ray_processes(cluster: str) -> dict[int, str]:
    """Titles of the processes that nodes of the cluster have started on this machine, by process id."""
    port, found = cluster.rpartition(":")[2], {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                options = Path(f"/proc/{parent}/cmdline").read_text().split("\0")
            except OSError:
                continue
            ours = any(option.startswith("--gcs-address=") and option.endswith(f":{port}") for option in options)
            if ours and command.startswith(b"ray::"):
                found[int(entry.name)] = command.rstrip(b"\0 ").decode()
    return found


def head_process(cluster: str) -> int:
    """Process id of the server (GCS) that keeps the state of the cluster at HOST:PORT, on this machine."""
    option = f"--gcs_server_port={cluster.rpartition(':')[2]}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if option in (entry / "cmdline").read_bytes().split(b"\0"):
                    return int(entry.name)
    raise LookupError(f"no server of the cluster at {cluster} runs on this machine")
