"""The manifests of infra/kubernetes are what Kubernetes, KubeRay, the job file, the image and the documents expect.

Every kind of mistake is planted and found.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from infra.local.servers import Ray
from pipeline.config.job_file import load_job
from pipeline.config.schema import TrainJob
from tests.unit.infra.kuberay_definitions import definition_problems
from tests.unit.infra.kubernetes_rules import BYTES, SPOT_LABELS, Manifest, gibibytes, mounts, node_terms, problems
from tests.unit.infra.kubernetes_schemas import render
from tests.unit.infra.test_image import PROJECT, user_of_the_image

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "infra/kubernetes"
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
OVERLAYS = "job-on-demand", "job-spot", "cluster-on-demand", "cluster-spot"
ROOTS = *(f"overlays/{name}" for name in OVERLAYS), "submit"


@cache
def _rendered(name: str) -> list[dict[str, Any]]:
    return render(FOLDER / name)


def rendered(name: str) -> list[dict[str, Any]]:
    """Objects of a folder that `kubectl apply -k` takes. The caller may change them."""
    return copy.deepcopy(_rendered(name))


@pytest.fixture(scope="module")
def job() -> TrainJob:
    (rayjob,) = Manifest(rendered("overlays/job-spot")).of("RayJob")
    entrypoint = ROOT / rayjob["spec"]["entrypoint"]
    assert os.access(entrypoint, os.X_OK)
    resolved = load_job(entrypoint)
    assert isinstance(resolved, TrainJob)
    return resolved


@pytest.mark.parametrize("name", ROOTS)
def test_a_manifest_has_no_mistake(name):
    assert problems(rendered(name)) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_starts_one_cluster(name):
    kinds = sorted(each["kind"] for each in rendered(f"overlays/{name}"))
    main = "RayJob" if name.startswith("job") else "RayCluster"
    assert kinds == sorted(["ServiceAccount", "ConfigMap", "ConfigMap", "NetworkPolicy", main])


def test_a_job_has_the_cluster_that_can_also_be_kept():
    for nodes in ("on-demand", "spot"):
        job, cluster = (Manifest(rendered(f"overlays/{kind}-{nodes}")).cluster for kind in ("job", "cluster"))
        assert job == cluster


def test_spot_moves_the_workers_and_nothing_else():
    demand, spot = (rendered(f"overlays/cluster-{nodes}") for nodes in ("on-demand", "spot"))
    for group in Manifest(demand).groups:
        (expressions,) = node_terms(group["template"]["spec"])
        assert {each["key"]: each["operator"] for each in expressions} == dict.fromkeys(SPOT_LABELS, "NotIn")
    for group in Manifest(spot).groups:
        terms = node_terms(group["template"]["spec"])
        assert [(each["key"], each["operator"], *each["values"]) for (each,) in terms] == [
            (label, "In", value) for label, value in SPOT_LABELS.items()
        ]
    for manifest in demand, spot:
        for group in Manifest(manifest).groups:
            del group["template"]["spec"]["affinity"], group["template"]["spec"]["tolerations"]
    assert demand == spot


DELETED = object()
DELETION_RULES = {"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED"}}]}
CLUSTER, SUBMIT, JOB = "overlays/cluster-on-demand", "submit", "overlays/job-spot"
SPEC = "RayCluster spec"
HEAD = f"{SPEC} headGroupSpec template spec"
HEAD_CONTAINER = f"{HEAD} containers 0"
WORKERS = f"{SPEC} workerGroupSpecs 0"
WORKER = f"{WORKERS} template spec"
WORKER_CONTAINER = f"{WORKER} containers 0"
SUBMITTER = "RayJob spec submitterPodTemplate spec"
ROOT_USER = {"runAsNonRoot": True, "runAsUser": 0, "runAsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}}

# Mistakes that a schema refuses: folder, place (an object's kind and keys), value, part of the message
REFUSED = [
    (CLUSTER, f"{SPEC} workerGroupSpec", [], "'workerGroupSpec' was unexpected"),
    (CLUSTER, f"{SPEC} headGroupSpec", DELETED, "'headGroupSpec' is a required property"),
    (CLUSTER, f"{SPEC} authOptions mode", "tokens", "'tokens' is not one of"),
    (CLUSTER, f"{SPEC} authOptions secretName", "mine", "'secretName' was unexpected"),  # KubeRay 1.5 does not know it
    (CLUSTER, f"{SPEC} rayVersion", 2.6, "2.6 is not of type 'string'"),
    (CLUSTER, f"{SPEC} headGroupSpec rayStartParams num-cpus", 0, "0 is not of type 'string'"),
    (CLUSTER, f"{WORKERS} replicas", "1", "'1' is not of type 'integer'"),
    (CLUSTER, f"{WORKERS} minReplica", 1, "'minReplica' was unexpected"),
    (CLUSTER, f"{WORKERS} maxReplicas", DELETED, "'maxReplicas' is a required property"),
    (CLUSTER, f"{HEAD} contaners", [], "'contaners' was unexpected"),
    (CLUSTER, f"{HEAD} terminationGracePeriodSeconds", "3m", "'3m' is not of type 'integer'"),
    (CLUSTER, f"{HEAD} securityContext runAsUser", "sagan", "'sagan' is not of type 'integer'"),
    (CLUSTER, f"{HEAD_CONTAINER} securityContext readOnlyRootFileSystem", True, "was unexpected"),
    (CLUSTER, f"{HEAD_CONTAINER} lifecycle preStop exec command", "python", "'python' is not of type 'array'"),
    (CLUSTER, f"{WORKER_CONTAINER} env 0 value", 100, "100 is not of type 'string'"),
    (CLUSTER, f"{WORKER_CONTAINER} image", 1.0, "1.0 is not of type 'string'"),
    (CLUSTER, f"{SPEC} autoscalerOptions securityContext", [], "[] is not of type 'object'"),
    (CLUSTER, f"{SPEC} autoscalerOptions securityContext rootReadOnly", True, "'rootReadOnly' was unexpected"),
    (CLUSTER, f"{SPEC} autoscalerOptions version", "v3", "'v3' is not one of"),
    (JOB, "RayJob spec activeDeadlineSeconds", "14d", "'14d' is not of type 'integer'"),
    (JOB, "RayJob spec ttlSecondsAfterFinish", 600, "'ttlSecondsAfterFinish' was unexpected"),
    (JOB, "RayJob spec submitterConfig backofLimit", 3, "'backofLimit' was unexpected"),
    (JOB, "RayJob spec rayClusterSpec headGroupSpec template spec hostnetwork", True, "'hostnetwork' was unexpected"),
]
REFUSED_BY_KUBERNETES = [
    (CLUSTER, "NetworkPolicy spec ingres", [], "'ingres' was unexpected"),
    (CLUSTER, "NetworkPolicy spec ingress 1 ports 0 port", [8265], "[8265] is not valid"),
    (CLUSTER, "ServiceAccount automountServiceAccountToken", "no", "'no' is not of type 'boolean'"),
    (SUBMIT, "Job spec activeDeadlineSecond", 1, "'activeDeadlineSecond' was unexpected"),
    (SUBMIT, "Job spec podFailurePolicy rules 1 onPodConditions 0 status", DELETED, "'status' is a required"),
]
# Mistakes that the schemas accept
FORBIDDEN = [
    (CLUSTER, f"{SPEC} headGroupSpec rayStartParams num-cpus", "4", "head: num-cpus is 0"),
    (CLUSTER, f"{SPEC} headGroupSpec rayStartParams num-cpus", DELETED, "head: num-cpus is 0"),
    (CLUSTER, f"{WORKERS} rayStartParams num-gpus", "4", "training: requests of nvidia.com/gpu and num-gpus"),
    (CLUSTER, f"{WORKER_CONTAINER} resources limits nvidia.com/gpu", DELETED, "training: limits of nvidia.com/gpu"),
    (CLUSTER, f"{WORKER_CONTAINER} resources requests cpu", "50", "training: the request of cpu and num-cpus"),
    (CLUSTER, f"{WORKERS} minReplicas", 2, "training: 0 <= minReplicas"),
    (CLUSTER, f"{WORKERS} minReplicas", -1, "minReplicas <= replicas <= maxReplicas"),
    (CLUSTER, f"{WORKER} tolerations", DELETED, "training: tolerates the taint of GPU nodes"),
    (CLUSTER, f"{WORKER_CONTAINER} resources limits memory", "256G", "'256G' for memory"),
    (CLUSTER, f"{WORKER_CONTAINER} resources limits memory", "256GB", "'256GB' is not valid"),
    (CLUSTER, f"{HEAD_CONTAINER} resources requests memory", "16000m", "'16000m' for memory"),
    (CLUSTER, f"{HEAD_CONTAINER} resources requests cpu", "4 cores", "'4 cores' is not valid"),
    (CLUSTER, f"{HEAD_CONTAINER} resources limits", DELETED, "a limit of memory"),
    (CLUSTER, f"{WORKER} volumes 2 emptyDir sizeLimit", "60", "volume cache has a sizeLimit in Mi or Gi"),
    (CLUSTER, f"{WORKER} volumes 2 emptyDir sizeLimit", DELETED, "volume cache has a sizeLimit in Mi or Gi"),
    (CLUSTER, f"{WORKER} volumes 0 emptyDir medium", DELETED, "/dev/shm in memory"),
    (CLUSTER, f"{WORKER} volumes 0 emptyDir sizeLimit", "200Gi", "/dev/shm counts against the limit of memory"),
    (CLUSTER, f"{WORKER_CONTAINER} volumeMounts 0 name", "shm", "mounted"),
    (CLUSTER, f"{HEAD_CONTAINER} volumeMounts 1", DELETED, "a volume for /tmp"),
    (CLUSTER, f"{HEAD_CONTAINER} envFrom 0 configMapRef name", "settings", "no ConfigMap {'settings'}"),
    (CLUSTER, f"{WORKER_CONTAINER} envFrom 1 secretRef name", "sagan-s3", "the secret of the documents"),
    (CLUSTER, f"{WORKER_CONTAINER} envFrom 1", DELETED, "settings and credentials reach every node"),
    (CLUSTER, "ConfigMap data AWS_SECRET_ACCESS_KEY", "abc", "AWS_SECRET_ACCESS_KEY in plain text"),
    (CLUSTER, f"{WORKER_CONTAINER} env 0", {"name": "MLFLOW_TRACKING_TOKEN", "value": "abc"}, "in plain text"),
    (SUBMIT, "Job spec template spec containers 0 env 3", {"name": "RAY_AUTH_TOKEN", "value": "a"}, "in plain text"),
    (CLUSTER, "ServiceAccount automountServiceAccountToken", True, "ServiceAccount sagan: no token"),
    (CLUSTER, f"{WORKER} automountServiceAccountToken", DELETED, "the account sagan without its token"),
    (CLUSTER, f"{HEAD} serviceAccountName", DELETED, "the account sagan without its token"),
    (CLUSTER, f"{SPEC} autoscalerOptions volumeMounts 1", DELETED, "the autoscaler, and nobody else, has a token"),
    (
        CLUSTER,
        f"{HEAD_CONTAINER} volumeMounts 0",
        {"name": "kubernetes-token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"},
        "the autoscaler, and nobody else, has a token",
    ),
    (CLUSTER, f"{HEAD} securityContext", DELETED, "a numeric user and group that are not root"),
    (CLUSTER, f"{WORKER} securityContext", ROOT_USER, "a numeric user and group that are not root"),
    (CLUSTER, f"{WORKER} securityContext runAsNonRoot", False, "a numeric user and group that are not root"),
    (CLUSTER, f"{WORKER} securityContext seccompProfile type", "Unconfined", "the seccomp profile"),
    (CLUSTER, f"{WORKER_CONTAINER} securityContext", DELETED, "no privilege escalation"),
    (CLUSTER, f"{WORKER_CONTAINER} securityContext readOnlyRootFilesystem", False, "that is read-only"),
    (CLUSTER, f"{WORKER_CONTAINER} securityContext privileged", True, "{'privileged'} come from the pod"),
    (CLUSTER, f"{SPEC} autoscalerOptions securityContext", DELETED, "autoscaler: no privilege escalation"),
    (JOB, f"{SUBMITTER} securityContext", DELETED, "a numeric user and group that are not root"),
    (JOB, f"{SUBMITTER} containers 0 securityContext", DELETED, "no privilege escalation"),
    (SUBMIT, "Job spec template spec securityContext runAsUser", DELETED, "a numeric user and group"),
    (CLUSTER, f"{HEAD} hostNetwork", True, "no {'hostNetwork'}"),
    (CLUSTER, f"{HEAD} shareProcessNamespace", True, "no {'shareProcessNamespace'}"),  # with it, jobs reach the token
    (CLUSTER, f"{WORKER} volumes 2", {"name": "cache", "hostPath": {"path": "/mnt"}}, "no hostPath"),
    (CLUSTER, f"{WORKER_CONTAINER} env 0 value", "120", "training: its grace period is longer than the drain of 120 s"),
    (CLUSTER, f"{WORKER_CONTAINER} env", DELETED, "training: its grace period is longer than the drain of 0 s"),
    (CLUSTER, f"{WORKER} terminationGracePeriodSeconds", DELETED, "training: its grace period is longer"),
    (CLUSTER, f"{HEAD} terminationGracePeriodSeconds", 120, "head: its grace period is longer than 120 s"),
    (CLUSTER, f"{HEAD_CONTAINER} lifecycle", DELETED, "head: preStop stops the jobs"),
    (CLUSTER, f"{WORKER_CONTAINER} command 4", "ulimit -n 65536; $KUBERAY_GEN_RAY_START_CMD", "tini passes SIGTERM"),
    (CLUSTER, f"{WORKER_CONTAINER} command", DELETED, "tini passes SIGTERM"),
    (CLUSTER, "RayCluster metadata annotations", DELETED, "RayCluster: KubeRay keeps the command"),
    (JOB, "RayJob metadata annotations", DELETED, "RayJob: KubeRay keeps the command"),
    (CLUSTER, f"{HEAD} affinity", DELETED, "head: not on a spot node"),
    (CLUSTER, f"{HEAD} tolerations", [{"key": "spot", "operator": "Exists"}], "head: tolerates no taint"),
    (CLUSTER, f"{SPEC} headGroupSpec template metadata annotations", DELETED, "head: no autoscaler of nodes"),
    (CLUSTER, f"{SPEC} authOptions mode", "disabled", "Ray asks for no token"),
    (CLUSTER, "NetworkPolicy", DELETED, "NetworkPolicy: the cluster itself"),
    (CLUSTER, "NetworkPolicy spec ingress 0 from", DELETED, "NetworkPolicy: the cluster itself"),
    (CLUSTER, "NetworkPolicy spec ingress 1 ports", DELETED, "NetworkPolicy: the cluster itself"),
    (CLUSTER, f"{WORKERS} template metadata labels", DELETED, "the labels of a cluster"),
    (JOB, "RayJob spec submitterPodTemplate metadata labels", DELETED, "the labels of a submitter"),
    (JOB, "RayJob spec activeDeadlineSeconds", DELETED, "RayJob: activeDeadlineSeconds"),
    (JOB, "RayJob spec backoffLimit", DELETED, "RayJob: backoffLimit"),
    (JOB, "RayJob spec shutdownAfterJobFinishes", DELETED, "RayJob: shutdownAfterJobFinishes"),
    (JOB, "RayJob spec deletionStrategy", DELETION_RULES, "RayJob: shutdownAfterJobFinishes"),
    (JOB, "RayJob spec submissionMode", "HTTPMode", "RayJob: K8sJobMode"),
    (JOB, "RayJob spec entrypoint", "jobs/celeba64.yaml", "RayJob: the submitter has the entrypoint"),
    (JOB, f"{SUBMITTER} containers 0 command", DELETED, "RayJob: submit.py submits"),
    (SUBMIT, "Job spec activeDeadlineSeconds", DELETED, "Job: activeDeadlineSeconds"),
    (CLUSTER, f"{SPEC} autoscalerOptions version", "v1", "autoscaler: version v2"),
    (CLUSTER, f"{HEAD} initContainers", [{"name": "first", "image": "busybox"}], "first: no privilege escalation"),
    (SUBMIT, "ConfigMap", {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "mine"}}, "a Secret is made by"),
    (SUBMIT, "Job spec template spec containers 0 image", "registry.example.com/sagan:latest", "and not latest"),
    (CLUSTER, f"{HEAD_CONTAINER} image", "sagan", "one image of a registry"),
    (CLUSTER, f"{WORKER_CONTAINER} image", "registry.example.com/sagan:0.0.9", "one image of a registry"),
]


def plant(objects: list[dict[str, Any]], place: str, value: object) -> None:
    kind, *keys = (int(key) if key.isdigit() else key for key in place.split())
    parent: Any = objects
    key: Any = next(number for number, each in enumerate(objects) if each["kind"] == kind)
    for each in keys:
        parent, key = parent[key], each
    if value is DELETED:
        del parent[key]
    else:
        parent[key] = value


@pytest.mark.parametrize(("folder", "place", "value", "message"), [*REFUSED, *REFUSED_BY_KUBERNETES, *FORBIDDEN])
def test_a_mistake_is_found(folder, place, value, message):
    objects = rendered(folder)
    plant(objects, place, value)
    assert any(message in problem for problem in problems(objects)), problems(objects)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"deletionRules": [{"policy": "DeleteSelf", "condition": {}}]}, "requires either the JobStatus or"),
        ({"onSuccess": {"policy": "DeleteSelf"}}, "deletionStrategy requires either BOTH"),
    ],
)
def test_kuberays_rules_in_cel_are_evaluated(rules, message):
    objects = rendered(JOB)
    plant(objects, "RayJob spec deletionStrategy", rules)
    (rayjob,) = Manifest(objects).of("RayJob")
    assert any(message in problem for problem in definition_problems(rayjob))


def test_a_typing_error_in_a_kustomization_is_refused(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    file = tmp_path / "kubernetes/overlays/job-spot/kustomization.yaml"
    file.write_text(file.read_text().replace("components:", "component:"))
    with pytest.raises(subprocess.CalledProcessError) as raised:
        render(file.parent)
    assert 'unknown field "component"' in raised.value.stderr


def test_the_cluster_has_what_the_job_asks_for(job):
    groups = Manifest(rendered("overlays/job-on-demand")).groups
    ray = [group["rayStartParams"] for group in groups for _ in range(group["minReplicas"])]
    assert sum(int(node["num-gpus"]) for node in ray) == job.train.workers + job.evaluate.gpus
    assert sum(min(int(node["num-gpus"]), int(node["num-cpus"]) // job.resources.cpus_per_worker) for node in ray) >= (
        job.train.workers
    )


def test_every_variable_of_the_job_file_is_given_and_used(job):
    asked = set(re.findall(r"\$\{(\w+)", (ROOT / f"jobs/{job.name}.yaml").read_text()))
    settings = next(
        each["data"] for each in rendered(JOB) if each["kind"] == "ConfigMap" and "AWS_ENDPOINT_URL" in each["data"]
    )
    assert {name for name in settings if name.startswith("SAGAN_")} == asked
    assert {"AWS_DEFAULT_REGION", "MLFLOW_TRACKING_URI"} <= set(settings)


def test_both_ways_submit_the_same_job(job):
    (submitter,) = Manifest(rendered(SUBMIT)).of("Job")
    (container,) = submitter["spec"]["template"]["spec"]["containers"]
    assert container["args"] == [f"jobs/{job.name}.yaml"]
    env = {entry["name"]: entry for entry in container["env"]}
    (cluster,) = Manifest(rendered(CLUSTER)).of("RayCluster")
    name = cluster["metadata"]["name"]  # KubeRay names the Service and the Secret after it
    assert env["RAY_DASHBOARD_ADDRESS"]["value"] == f"{name}-head-svc:8265"
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}
    assert env["RAY_JOB_SUBMISSION_ID"]["value"] == job.name


def test_the_cache_volume_holds_the_cache_and_the_home_folder_is_writable(job):
    for path, (container, pod) in Manifest(rendered(JOB)).containers.items():
        if "ray-" not in path or "submitter" in path:
            continue
        home = "/home/sagan"
        assert home in mounts(container)
        if "ray-worker" in path:
            folder = str(Path(job.data.cache.replace("~", home)).parents[1])
            (size,) = (
                volume["emptyDir"]["sizeLimit"]
                for volume in pod["volumes"]
                if volume["name"] == mounts(container)[folder]
            )
            assert BYTES.fullmatch(size)
            assert gibibytes(size) >= job.data.cache_gb


def test_a_stopped_job_has_time_to_finish_its_checkpoint():
    head = Manifest(rendered(JOB)).head["template"]["spec"]["containers"][0]
    (wait,) = (int(entry["value"]) for entry in head["env"] if entry["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
    assert wait >= int(Ray().environment()["RAY_JOB_STOP_WAIT_TIME_S"])


@pytest.mark.parametrize("name", ROOTS)
def test_user_and_versions_are_those_of_the_image(name):
    manifest = Manifest(rendered(name))
    for path, template in manifest.templates.items():
        security = template["spec"]["securityContext"]
        assert (security["runAsUser"], security["runAsGroup"]) == user_of_the_image(), path
    images = {container["image"] for container, _ in manifest.containers.values() if "image" in container}
    assert [image.rpartition(":")[2] for image in images] == [PROJECT["version"]]
    if manifest.cluster:
        assert manifest.cluster["rayVersion"] == PINS["ray"]
    assert re.search(r"\btini\b", (ROOT / "infra/image/Dockerfile").read_text())


def test_the_documents_name_existing_folders():
    text = (ROOT / "infra/README.md").read_text()
    named = set(re.findall(r"infra/kubernetes/([\w/-]+\w)", text))
    assert {"overlays/job-spot", "overlays/cluster-on-demand", "submit"} <= named
    assert [name for name in named if not list(FOLDER.glob(f"{name}*"))] == []


@pytest.mark.parametrize(
    ("exit_code", "again"),
    [
        (None, True),  # Ray does not know how the driver ended
        (-9, True),
        (137, True),  # killed for its memory, under a shell
        (130, True),  # interrupted
        (3, True),  # the GPU nodes of a new head come later than the head
        (1, False),
        (2, False),
        (4, False),  # a new driver has no more budget
    ],
)
def test_a_job_is_submitted_again_where_a_new_driver_may_succeed(exit_code, again):
    spec = importlib.util.spec_from_file_location("submit", FOLDER / "base/scripts/submit.py")
    assert spec
    assert spec.loader
    submit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(submit)
    assert submit.can_start_again(exit_code) is again
