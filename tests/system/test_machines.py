"""Three machines as infra/machines makes them: one leaves at its cloud's notice, and one is lost without notice."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.local.server_process import PATH
from infra.local.servers import Ray
from tests.metadata_server import MetadataServer
from tests.system.command_process import Driver
from tests.system.ray_node import RAY_ON_LOOPBACK, RayNode

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]


def service(name: str) -> list[str]:
    """The command of a unit of systemd, for this checkout."""
    (command,) = re.findall("^ExecStart=(.+)$", (ROOT / f"infra/machines/{name}.service").read_text(), re.MULTILINE)
    return shlex.split(command.replace("/opt/sagan", str(ROOT)))


class Head(Ray):
    """The machine of sagan-head.service. `folder` is its /opt/sagan, with node.env."""

    def __init__(self, folder: Path) -> None:
        super().__init__(cpus=0, env=machine(folder))
        self.folder = folder
        (folder / "jobs").symlink_to(ROOT / "jobs")
        settings = {
            "RAY_AUTH_TOKEN": self.token,
            "SAGAN_BUCKET": str(folder / "bucket"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        (folder / "node.env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))

    def command(self) -> list[str]:
        _, _, _, _, *options = super().command()  # ray start --head --block
        return ["env", f"--chdir={self.folder}", *service("sagan-head"), *options]


class Worker(RayNode):
    """A machine of sagan-worker.service."""

    name = "a machine with workers"

    def __init__(self, head: Head, **cloud: str) -> None:
        super().__init__(head, cpus=1, env={**machine(head.folder), "SAGAN_HEAD": head.env["RAY_ADDRESS"], **cloud})

    def command(self) -> list[str]:
        return [*service("sagan-worker"), *self.options()]


class LaunchedWorker(Worker):
    """A machine on which Ray's launcher has run the command of aws.yaml, in the background of another shell."""

    leaving_s = 1.0  # nothing passes SIGTERM on

    def command(self) -> list[str]:
        launcher = yaml.safe_load((ROOT / "infra/machines/aws.yaml").read_text())
        _, command = launcher["worker_start_ray_commands"]  # `ray stop` would end the other machines
        command = command.replace("/tmp/node.log", str(self.scratch / "node.log")).replace(
            ":6379", f":{self.head.gcs_port}"
        )
        command = command.replace("node.sh worker", shlex.join(["node.sh", "worker", *self.options()]))
        script = f"export RAY_HEAD_IP=127.0.0.1; cd {ROOT}; {command} && echo joined && exec sleep infinity"
        return ["bash", "-c", script]

    def ready(self) -> bool:
        return "joined" in self.log.read_text()


def machine(folder: Path) -> dict[str, str]:
    """Environment of the units, with a `ray` of which several fit on one machine."""
    ray = folder / "bin/ray"
    ray.parent.mkdir(exist_ok=True)
    ray.write_text(f"#!{sys.executable}\n{RAY_ON_LOOPBACK}")
    ray.chmod(0o700)
    return {"PATH": f"{ray.parent}:{PATH}", "SAGAN_NODE_ENV": str(folder / "node.env")}


def test_one_machine_is_drained_and_one_is_killed(tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"train.workers": 2, "train.max_failures": 1, "track.register": "false"}
    with MetadataServer("aws") as aws, Head(tmp_path) as head, Worker(head) as killed:
        with Worker(head, SAGAN_CLOUD="aws", **aws.env) as drained:
            *submit, _ = service("sagan-job@")
            env = {**machine(tmp_path), "RAY_DASHBOARD_ADDRESS": f"127.0.0.1:{head.port}"}
            run = Driver(tmp_path, env, command=submit, job=Path("quickstart"), name="machines", **overrides)
            run.until("checkpoint 0")
            assert aws.asked.wait(60)
            aws.give_notice()
            run.until("will be taken away in ")
            drained.wait_for_end()
            assert "takes this machine away: terminate at " in drained.log.read_text()
        with MetadataServer("aws") as calm, LaunchedWorker(head, **calm.env):
            assert "the run had reached" not in run.until("resumed from "), "no image is lost"
            assert calm.asked.wait(60)
            run.until("checkpoint 0")
            killed.kill()
            with Worker(head):
                run.until("resumed from ")
                assert run.end() == 0, run.output
    summary = run.summary("machines")
    assert summary["restarts"] == 2
    assert summary["images_lost"] <= 320 + 32  # an interval between checkpoints, and the step in progress
