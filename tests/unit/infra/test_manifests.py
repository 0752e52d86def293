"""The image and the Kubernetes manifest say what the code, the job file and the pinned versions say."""

from __future__ import annotations

import os
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.local.servers import Ray
from pipeline.config.job_file import load_job
from pipeline.config.schema import TrainJob

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    manifest = yaml.safe_load((ROOT / "infra/kubernetes/rayjob.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    return manifest["spec"]


@pytest.fixture(scope="module")
def job(rayjob) -> TrainJob:
    resolved = load_job(ROOT / rayjob["entrypoint"])
    assert isinstance(resolved, TrainJob)
    return resolved


def pods(rayjob: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod specifications by group."""
    cluster = rayjob["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]} | {"head": cluster["headGroupSpec"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    return only


def env(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in container(pod)["env"]}


def test_the_entrypoint_is_an_executable_job(rayjob):
    assert os.access(ROOT / rayjob["entrypoint"], os.X_OK)


def test_the_cluster_has_what_the_job_asks_for(rayjob, job):
    groups = rayjob["rayClusterSpec"]["workerGroupSpecs"]
    ray = [group["rayStartParams"] for group in groups for _ in range(group["replicas"])]
    evaluation = job.evaluate
    assert sum(int(node["num-gpus"]) for node in ray) == job.train.workers + evaluation.gpus
    assert sum(min(int(node["num-gpus"]), int(node["num-cpus"]) // job.resources.cpus_per_worker) for node in ray) >= (
        job.train.workers
    )
    for group in groups:
        asked = container(group["template"]["spec"])["resources"]["requests"]
        assert asked["cpu"] == group["rayStartParams"]["num-cpus"]
        assert str(asked["nvidia.com/gpu"]) == group["rayStartParams"]["num-gpus"]


def test_every_variable_of_the_job_file_is_given_and_used(rayjob):
    asked = set(re.findall(r"\$\{(\w+)", (ROOT / rayjob["entrypoint"]).read_text()))
    given = {name for name in env(pods(rayjob)["head"]) if name.startswith("SAGAN_")}
    assert given == asked


def test_secrets_are_by_reference_only(rayjob):
    for pod in pods(rayjob).values():
        for name, entry in env(pod).items():
            if re.search("KEY|SECRET|TOKEN|PASSWORD", name):
                assert set(entry) == {"name", "valueFrom"}
                assert "secretKeyRef" in entry["valueFrom"]


def test_storage_and_tracker_reach_every_pod(rayjob):
    everywhere = {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI"}
    for pod in pods(rayjob).values():
        assert everywhere <= set(env(pod))


def test_shared_memory_is_memory_and_the_cache_volume_is_large_enough(rayjob, job):
    for name, pod in pods(rayjob).items():
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(pod)["volumeMounts"]}
        assert mounts["/dev/shm"]["medium"] == "Memory"
        if name != "head":
            cache = mounts[str(Path(job.data.cache.replace("~", "/home/sagan")).parents[1])]
            assert int(cache["sizeLimit"].removesuffix("Gi")) >= job.data.cache_gb


def test_a_stopped_job_has_time_to_finish_its_checkpoint(rayjob):
    head = pods(rayjob)["head"]
    ours = Ray().environment()
    wait = int(env(head)["RAY_JOB_STOP_WAIT_TIME_S"]["value"])
    assert int(ours["RAY_JOB_STOP_WAIT_TIME_S"]) <= wait < head["terminationGracePeriodSeconds"]
    assert head["shareProcessNamespace"]  # else an orphan's zombie makes every stop last that long
    assert not head.get("tolerations")  # the head must not stand on a spot machine


def test_versions_are_the_pinned_ones(rayjob):
    assert rayjob["rayClusterSpec"]["rayVersion"] == PINS["ray"]
    images = {container(pod)["image"].rpartition(":")[2] for pod in pods(rayjob).values()}
    assert images == {PROJECT["version"]}


def test_the_image_copies_only_existing_paths():
    dockerfile = (ROOT / "infra/image/Dockerfile").read_text()
    (python,) = re.findall(r"^FROM python:3\.(\d+)", dockerfile, re.MULTILINE)
    low, high = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    assert int(low) <= int(python) < int(high)
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()]
    assert {"pyproject.toml", "constraints.txt", "sagan", "pipeline", "jobs"} <= set(copied)
    lines = (ROOT / "infra/image/Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert set(copied) == allowed  # the rest of the checkout, .venv and runs among it, stays out
    assert all((ROOT / name).exists() for name in copied)
    assert any(fnmatch("runs", line) for line in lines)
