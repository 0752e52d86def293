"""The image and the Kubernetes manifest say what the code, the job file and the pinned versions say."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
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
def documents() -> dict[str, dict[str, Any]]:
    """Every object of infra/kubernetes by its kind."""
    found = [
        document
        for path in sorted((ROOT / "infra/kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]
    by_kind = {document["kind"]: document for document in found}
    assert len(by_kind) == len(found)
    return by_kind


@pytest.fixture(scope="module")
def rayjob(documents) -> dict[str, Any]:
    assert documents["RayJob"]["apiVersion"] == "ray.io/v1"
    return documents["RayJob"]["spec"]


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


def templates(tree: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template at any depth: a mapping with the `spec` of a pod. With its path."""
    if isinstance(tree, dict) and "containers" in (tree.get("spec") or {}):
        yield path, tree
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from templates(child, f"{path}/{key}")


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


def user_of_the_image() -> tuple[int, int]:
    dockerfile = (ROOT / "infra/image/Dockerfile").read_text()
    *_, last = re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE)
    user, group = last.split(":")
    return int(user), int(group)


def test_the_image_runs_as_a_numeric_user_on_a_base_that_whoever_builds_it_names():
    user, group = user_of_the_image()
    assert user > 0
    assert group > 0
    dockerfile = (ROOT / "infra/image/Dockerfile").read_text()
    assert f"useradd --create-home --uid {user} " in dockerfile
    assert re.findall(r"^(?:FROM|ARG BASE).*$", dockerfile, re.MULTILINE) == ["ARG BASE", "FROM ${BASE}"]
    for text in (dockerfile, (ROOT / "infra/README.md").read_text()):
        commands = re.findall(r"docker build (?:.*\\\n)*.*", text)
        assert commands
        assert all("--build-arg BASE=python:3.11-slim-bookworm@sha256:" in command for command in commands)


def test_no_pod_has_more_rights_than_it_needs(documents):
    user, group = user_of_the_image()
    found = dict(templates(documents))
    assert {path.split("/")[3] for path in found} == {"submitterPodTemplate", "rayClusterSpec"}
    assert len(found) == 4  # the submitter, the head and two groups of workers
    for path, template in found.items():
        pod = template["spec"]
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True, path
        assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (user, group, group), path
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, path
        assert pod["automountServiceAccountToken"] is False, path
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), path
        assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume], path
        for each in [*pod["containers"], *pod.get("initContainers", [])]:
            own = each["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, path
            assert own["capabilities"] == {"drop": ["ALL"]}, path
            assert not {"privileged", "runAsUser", "runAsNonRoot", "seccompProfile"} & set(own), path


def test_only_the_cluster_the_submitter_and_the_operator_reach_the_cluster(documents):
    policy = documents["NetworkPolicy"]["spec"]
    labels = {path: template["metadata"]["labels"] for path, template in templates(documents)}
    selected = {path for path, own in labels.items() if policy["podSelector"]["matchLabels"].items() <= own.items()}
    assert selected == {path for path in labels if "rayClusterSpec" in path}
    assert policy["policyTypes"] == ["Ingress"]

    everything, dashboard = policy["ingress"]
    (peer,) = everything["from"]
    assert peer == {"podSelector": policy["podSelector"]}
    assert set(everything) == {"from"}
    submitter, operator = dashboard["from"]
    matched = [path for path, own in labels.items() if submitter["podSelector"]["matchLabels"].items() <= own.items()]
    assert matched == ["/RayJob/spec/submitterPodTemplate"]
    assert set(submitter) == {"podSelector"}
    assert operator["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}
    assert dashboard["ports"] == [{"protocol": "TCP", "port": 8265}]


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


def test_workers_have_time_for_a_checkpoint_before_their_node_is_taken_away(rayjob):
    for name, pod in pods(rayjob).items():
        if name != "head":
            drain = int(env(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]["value"])
            assert 30 < drain < pod["terminationGracePeriodSeconds"]


def test_versions_are_the_pinned_ones(rayjob):
    assert rayjob["rayClusterSpec"]["rayVersion"] == PINS["ray"]
    images = {container(template["spec"])["image"] for _, template in templates(rayjob)}
    assert [image.rpartition(":")[2] for image in images] == [PROJECT["version"]]


def test_the_image_copies_only_existing_paths():
    dockerfile = (ROOT / "infra/image/Dockerfile").read_text()
    (python,) = set(re.findall(r"python:3\.(\d+)", dockerfile))
    low, high = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    assert int(low) <= int(python) < int(high)
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()]
    assert {"pyproject.toml", "constraints.txt", "sagan", "pipeline", "jobs"} <= set(copied)
    lines = (ROOT / "infra/image/Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert set(copied) == allowed  # the rest of the checkout, .venv and runs among it, stays out
    assert all((ROOT / name).exists() for name in copied)
    assert any(fnmatch("runs", line) for line in lines)
