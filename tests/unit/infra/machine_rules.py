"""What Ray's cluster launcher and systemd need to run sagan: rules that name the place and the mistake."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
from botocore.session import get_session
from botocore.validate import ParamValidator

from tests.unit.infra.kubernetes_rules import CREDENTIALS

ROOT = Path(__file__).resolve().parents[3]
CHECKOUT = "/opt/sagan"  # of the units, and WORKDIR of the image
INLINE = re.compile(r"\b[A-Z_]*(KEY|SECRET|TOKEN|PASSWORD)[A-Z_]*=\S")
START = "setsid --fork infra/machines/node.sh {} > /tmp/node.log 2>&1 < /dev/null; timeout 300 "
READY = "grep -q 'Ray runtime started' <(tail -n +1 -f /tmp/node.log)"
GCP_FIELDS = {"machineType", "disks", "scheduling"}
GCP_SPOT = {
    "provisioningModel": "SPOT",
    "instanceTerminationAction": "DELETE",
    "onHostMaintenance": "TERMINATE",
    "automaticRestart": False,
}

Found = Iterator[str]


def launcher_problems(config: dict[str, Any]) -> list[str]:
    """Return what is wrong with a file for `ray up`. Nothing is asked of a cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)
    try:
        prepared = prepare_config(config)
        validate_config(prepared)
    except (jsonschema.ValidationError, ValueError, AssertionError, KeyError) as error:
        return [f"Ray refuses it: {getattr(error, 'message', error)}"]
    return list(_launcher_rules(prepared))


def _launcher_rules(config: dict[str, Any]) -> Found:
    cloud, types = config["provider"]["type"], dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    if head["resources"] != {"CPU": 0}:
        yield "head: no CPUs, for workers and scores belong on GPU nodes"
    for name, each in {"head": head, **types}.items():
        yield from (f"{name}: {problem}" for problem in _NODE_RULES[cloud](each["node_config"], name != "head"))
    for name, each in types.items():
        if not each["resources"].get("CPU") or not each["resources"].get("GPU"):
            yield f"{name}: CPUs and GPUs"
        if not 0 <= each["min_workers"] <= each["max_workers"]:
            yield f"{name}: 0 <= min_workers <= max_workers"
    if config["max_workers"] < sum(each["max_workers"] for each in types.values()):
        yield "max_workers: the sum of those of the node types"
    docker = config["docker"]
    if not re.fullmatch(r".+/.+(:[^:/]+|@sha256:[0-9a-f]{64})", docker["image"]) or docker["image"].endswith(":latest"):
        yield f"an image of a registry, with a tag or a digest, and not {docker['image']}"
    options = docker.get("run_options", [])
    for option in ("--cap-drop=ALL", "--security-opt=no-new-privileges", "--ulimit=nofile=65536:65536"):
        if option not in options:
            yield f"docker: {option}"
    if "--gpus=all" not in docker.get("worker_run_options", []):
        yield "docker: the container of a worker sees the GPUs"
    settings = [option.partition("SAGAN_NODE_ENV=")[2] for option in options if "SAGAN_NODE_ENV" in option]
    if [str(Path(path).parent) for path in settings] != list(config["file_mounts"]):
        yield "node.env is in a folder that is mounted"
    if any(not str(path).startswith("~/") for path in config["file_mounts"].values()):
        yield "secrets stay in the home folder of whoever calls `ray up`"
    if inline := INLINE.search(str(config)):
        yield f"{inline.group()[:20]}… in plain text"
    boot = "head --autoscaling-config=/home/sagan/ray_bootstrap_config.yaml"
    if config["head_start_ray_commands"] != ["ray stop", START.format(boot) + READY]:
        yield "head: node.sh, in the background, with the autoscaler's configuration"
    join = f"SAGAN_CLOUD={cloud} SAGAN_HEAD=$RAY_HEAD_IP:6379 {START.format('worker')}{READY}"
    if config["worker_start_ray_commands"] != ["ray stop", join]:
        yield "workers: node.sh, in the background, with the cloud and the head"
    if any("ray" in command for command in config["head_setup_commands"] + config["worker_setup_commands"]):
        yield "the image has Ray; no command installs it"


def _aws_node(config: dict[str, Any], spot: bool) -> Found:
    shape = _run_instances()
    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **config}, shape)
    if report.has_errors():
        yield report.generate_report()
        return
    if config.get("InstanceType") not in shape.members["InstanceType"].enum:
        yield f"no instance type {config.get('InstanceType')}"
    if config.get("InstanceMarketOptions", {}).get("MarketType") != ("spot" if spot else None):
        yield "spot" if spot else "on demand"
    if config.get("MetadataOptions", {}).get("HttpTokens") != "required":
        yield "IMDSv2 alone"
    if not config.get("ImageId", "").startswith("ami-") or "IamInstanceProfile" not in config:
        yield "a machine image and an instance profile, for Ray's own are old and may do too much"
    if config.get("BlockDeviceMappings", [{}])[0].get("Ebs", {}).get("VolumeSize", 0) < (200 if spot else 100):
        yield "a disk for the image and the cache"


@cache
def _run_instances() -> Any:
    return get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _gcp_node(config: dict[str, Any], spot: bool) -> Found:
    if unknown := set(config) - GCP_FIELDS:
        yield f"unknown fields {unknown}"
    if config.get("scheduling") != (GCP_SPOT if spot else None):
        yield "spot" if spot else "on demand"
    disks = [disk for disk in config.get("disks", []) if disk.get("boot") and disk.get("autoDelete")]
    sizes = [disk["initializeParams"].get("diskSizeGb", 0) for disk in disks]
    if len(sizes) != 1 or sizes[0] < (200 if spot else 100):
        yield "a disk for the image and the cache, which is deleted with the machine"


_NODE_RULES = {"aws": _aws_node, "gcp": _gcp_node}

Unit = dict[str, dict[str, list[str]]]


def read_unit(text: str) -> Unit:
    """Return the values of a unit of systemd by section and key."""
    sections: Unit = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("["):
            keys = sections.setdefault(line.strip("[]"), defaultdict(list))
        elif not line.startswith("#"):
            key, _, value = line.partition("=")
            keys[key].append(value)
    return sections


def unit_problems(name: str, text: str) -> list[str]:
    """Return what is wrong with a unit of infra/machines."""
    if set(unit := read_unit(text)) != {"Unit", "Service", "Install"}:
        return [f"sections {set(unit)}"]
    return [*_unit_rules(name, unit)]


def _unit_rules(name: str, unit: Unit) -> Found:
    service, part = unit["Service"], {"sagan-head": "head", "sagan-worker": "worker", "sagan-job@": "submit %i"}[name]
    script = f"{CHECKOUT}/infra/machines/node.sh"
    if service["ExecStart"] != [f"{script} {part}"]:
        yield f"ExecStart: {script} {part}"
    stop = {"head": [f"-{script} stop"], "worker": [], "submit %i": [f"-{script} stop %i"]}[part]
    if service["ExecStop"] != stop:
        yield f"ExecStop: {stop}"
    if service["User"] != ["sagan"] or service["NoNewPrivileges"] != ["yes"] or service["ProtectSystem"] != ["full"]:
        yield "a user without rights"
    if service["WorkingDirectory"] != [CHECKOUT]:
        yield "job files are found in the working directory"
    environment = " ".join(service["Environment"])
    if f"PATH={CHECKOUT}/.venv/bin:" not in environment:
        yield "the first line of a job file runs `python`"
    if CREDENTIALS.search(environment) or INLINE.search(str(unit)):
        yield "a secret in plain text"
    wait, drain = 120, 100  # RAY_JOB_STOP_WAIT_TIME_S and the longest drain of node.sh
    longest = {"head": wait + drain, "worker": drain, "submit %i": wait}[part]
    if int((service["TimeoutStopSec"] or ["0"])[0]) < longest + 20:
        yield f"TimeoutStopSec: longer than {longest} s"
    if part != "submit %i":
        if service["KillMode"] != ["mixed"]:
            yield "SIGTERM for `ray start` alone"
        if service["Restart"] != ["on-failure"] or unit["Unit"]["StartLimitIntervalSec"] != ["0"]:
            yield "starts again after a failure, and not after a notice"
        if service["LimitNOFILE"] != ["65536"]:
            yield "Ray opens many files"
        if unit["Unit"]["After"] != ["network-online.target"]:
            yield "it ends before the network does"
    elif unit["Unit"]["After"] != ["sagan-head.service"]:
        yield "it ends before its head does"
    if unit["Install"]["WantedBy"] != ["multi-user.target"]:
        yield "starts with the machine"
