"""What a cluster of sagan needs beyond the schemas: rules that name the place and the mistake."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tests.unit.infra.kubernetes_schemas import pod_templates, schema_problems

LABELS = "app.kubernetes.io/name", "app.kubernetes.io/component"
SPOT_LABELS = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
CREDENTIALS = re.compile("KEY|SECRET|TOKEN|PASSWORD")
CPUS, BYTES = re.compile(r"\d+m?"), re.compile(r"\d+(Mi|Gi)")  # Kubernetes takes 16G and 16m for memory, too
GPU = "nvidia.com/gpu"
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - a folder
COMMAND = ["tini", "--", "bash", "-c", "ulimit -n 65536; exec $KUBERAY_GEN_RAY_START_CMD"]

Found = Iterator[str]


@dataclass(frozen=True)
class Manifest:
    """The objects of one `kubectl apply -k`."""

    objects: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.objects if each["kind"] == kind]

    @cached_property
    def templates(self) -> dict[str, dict[str, Any]]:
        """Every pod template by its path."""
        return {f"{each['kind']}/{path}": pod for each in self.objects for path, pod in pod_templates(each)}

    @cached_property
    def cluster(self) -> dict[str, Any]:
        """The specification of the RayCluster. Empty where there is none."""
        specs = [each["spec"] for each in self.of("RayCluster")]
        specs += [each["spec"].get("rayClusterSpec", {}) for each in self.of("RayJob")]
        return specs[0] if specs else {}

    @property
    def head(self) -> dict[str, Any]:
        return self.cluster["headGroupSpec"]

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.cluster.get("workerGroupSpecs", [])

    @cached_property
    def containers(self) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        """Every container by its path, with its pod. The autoscaler's container is KubeRay's with our options."""
        found = {
            f"{path}/{each['name']}": (each, pod["spec"])
            for path, pod in self.templates.items()
            for kind in ("containers", "initContainers")
            for each in pod["spec"].get(kind, [])
        }
        if self.cluster.get("enableInTreeAutoscaling"):
            found["autoscaler"] = (self.cluster.get("autoscalerOptions", {}), self.head["template"]["spec"])
        return found


def problems(objects: list[dict[str, Any]]) -> list[str]:
    """Return what is wrong with the objects of one `kubectl apply -k`. The rules need objects that fit the schemas."""
    found = [message for each in objects for message in schema_problems(each)]
    manifest = Manifest(objects)
    return found or [message for rule in RULES for message in rule(manifest)]


def pods_are_confined(manifest: Manifest) -> Found:
    for path, template in manifest.templates.items():
        pod = template["spec"]
        security = pod.get("securityContext", {})
        if security.get("runAsNonRoot") is not True or not security.get("runAsUser") or not security.get("runAsGroup"):
            yield f"{path}: a numeric user and group that are not root"
        if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{path}: the seccomp profile RuntimeDefault"
        if shared := {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & {key for key in pod if pod[key]}:
            yield f"{path}: no {shared}"
        if any("hostPath" in volume for volume in pod.get("volumes", [])):
            yield f"{path}: no hostPath"
    for path, (container, _) in manifest.containers.items():
        security = container.get("securityContext", {})
        if security.get("allowPrivilegeEscalation") is not False or security.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{path}: no privilege escalation, and no capabilities"
        if security.get("readOnlyRootFilesystem") is not True:
            yield f"{path}: a root file system that is read-only"
        if rights := {"privileged", "runAsUser", "runAsNonRoot", "seccompProfile"} & set(security):
            yield f"{path}: {rights} come from the pod"
        if "/tmp" not in mounts(container):
            yield f"{path}: a volume for /tmp"


def mounts(container: dict[str, Any]) -> dict[str, str]:
    """Names of volumes by the folder where they are mounted."""
    return {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}


def volumes_and_settings_exist(manifest: Manifest) -> Found:
    maps = {each["metadata"]["name"] for each in manifest.of("ConfigMap")}
    has_cluster = bool(manifest.cluster)
    for path, template in manifest.templates.items():
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
        used = {
            name
            for container, pod in manifest.containers.values()
            if pod is template["spec"]
            for name in mounts(container).values()
        }
        if used != set(volumes):
            yield f"{path}: volumes {set(volumes)}, mounted {used}"
        named = {volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume}
        for container in template["spec"]["containers"]:
            sources = container.get("envFrom", [])
            named |= {source["configMapRef"]["name"] for source in sources if "configMapRef" in source}
            secrets = {source["secretRef"]["name"] for source in sources if "secretRef" in source}
            if secrets - {"sagan-credentials"}:
                yield f"{path}: the secret of the documents is sagan-credentials, not {secrets}"
            if "GroupSpec" in path and ("sagan-settings" not in named or not secrets):
                yield f"{path}: settings and credentials reach every node"
        if has_cluster and named - maps:
            yield f"{path}: no ConfigMap {named - maps}"


def credentials_are_by_reference(manifest: Manifest) -> Found:
    if manifest.of("Secret"):
        yield "a Secret is made by `kubectl create secret` and not by a file"
    for path, (container, _) in manifest.containers.items():
        for entry in container.get("env", []):
            if CREDENTIALS.search(entry["name"]) and "secretKeyRef" not in entry.get("valueFrom", {}):
                yield f"{path}: {entry['name']} in plain text"
    for each in manifest.of("ConfigMap"):
        for name in each["data"]:
            if CREDENTIALS.search(name):
                yield f"ConfigMap {each['metadata']['name']}: {name} in plain text"


def no_token_of_kubernetes(manifest: Manifest) -> Found:
    accounts = {each["metadata"]["name"]: each for each in manifest.of("ServiceAccount")}
    for name, account in accounts.items():
        if account.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {name}: no token in every pod"
    for path, template in manifest.templates.items():
        pod = template["spec"]
        if pod.get("serviceAccountName") != "sagan" or pod.get("automountServiceAccountToken") is not False:
            yield f"{path}: the account sagan without its token"
    for path, (container, pod) in manifest.containers.items():
        tokens = {volume["name"] for volume in pod.get("volumes", []) if "projected" in volume}
        mounted = {folder for folder, name in mounts(container).items() if name in tokens}
        if mounted != ({TOKEN_FOLDER} if path == "autoscaler" else set()):
            yield f"{path}: the autoscaler, and nobody else, has a token at {TOKEN_FOLDER}"


def only_the_cluster_and_its_submitters_reach_it(manifest: Manifest) -> Found:
    labels = {path: pod.get("metadata", {}).get("labels", {}) for path, pod in manifest.templates.items()}
    for path, own in labels.items():
        part = "submitter" if "submitter" in path or path.startswith("Job/") else "cluster"
        if [own.get(label) for label in LABELS] != ["sagan", part]:
            yield f"{path}: the labels of a {part}, by which the NetworkPolicy knows it"
    if not manifest.cluster:
        return
    if manifest.cluster.get("authOptions") != {"mode": "token"}:
        yield "Ray asks for no token"
    cluster, submitter = (
        {"matchLabels": dict(zip(LABELS, ("sagan", part), strict=True))} for part in ("cluster", "submitter")
    )
    operator = {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}
    wanted = {
        "podSelector": cluster,
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [{"podSelector": cluster}]},
            {
                "from": [{"podSelector": submitter}, {"namespaceSelector": {}, "podSelector": operator}],
                "ports": [{"protocol": "TCP", "port": 8265}],
            },
        ],
    }
    if [each["spec"] for each in manifest.of("NetworkPolicy")] != [wanted]:
        yield "NetworkPolicy: the cluster itself, and on the dashboard's port its submitters and KubeRay's operator"


def amounts_have_units(manifest: Manifest) -> Found:
    for path, (container, _) in manifest.containers.items():
        resources = container.get("resources", {})
        amounts = [item for kind in ("requests", "limits") for item in resources.get(kind, {}).items()]
        for name, amount in amounts:
            if not {"cpu": CPUS, "memory": BYTES}.get(name, CPUS).fullmatch(str(amount)):
                yield f"{path}: {amount!r} for {name}; cpu in cores or m, memory in Mi or Gi"
        if not {"cpu", "memory"} <= set(resources.get("requests", {})) or "memory" not in resources.get("limits", {}):
            yield f"{path}: requests of cpu and memory, and a limit of memory"
    for path, template in manifest.templates.items():
        for volume in template["spec"].get("volumes", []):
            if "emptyDir" in volume and not BYTES.fullmatch(str((volume["emptyDir"] or {}).get("sizeLimit"))):
                yield f"{path}: volume {volume['name']} has a sizeLimit in Mi or Gi"


def gibibytes(amount: str) -> float:
    return float(amount[:-2]) / (1 if amount.endswith("Gi") else 1024)


def ray_knows_what_the_pods_have(manifest: Manifest) -> Found:
    if not manifest.cluster:
        return
    if manifest.head["rayStartParams"].get("num-cpus") != "0":
        yield "head: num-cpus is 0, for workers and scores belong on GPU nodes"
    for group in manifest.groups:
        name, ray = group["groupName"], group["rayStartParams"]
        (container,) = group["template"]["spec"]["containers"]
        for kind in ("requests", "limits"):
            if str(container["resources"][kind].get(GPU)) != ray.get("num-gpus") or ray.get("num-gpus") == "0":
                yield f"{name}: {kind} of {GPU} and num-gpus are the same number"
        if container["resources"]["requests"]["cpu"] != ray.get("num-cpus"):
            yield f"{name}: the request of cpu and num-cpus are the same number"
        if not 0 <= group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            yield f"{name}: 0 <= minReplicas <= replicas <= maxReplicas"
        if not any(each.get("key") == GPU for each in group["template"]["spec"].get("tolerations", [])):
            yield f"{name}: tolerates the taint of GPU nodes"


def memory_is_shared(manifest: Manifest) -> Found:
    for path, (container, pod) in manifest.containers.items():
        if not container.get("name", "").startswith(("ray-head", "ray-worker")):
            continue
        volumes = {volume["name"]: volume.get("emptyDir") or {} for volume in pod["volumes"]}
        shared = volumes.get(mounts(container).get("/dev/shm", ""), {})
        size, limit = shared.get("sizeLimit"), container.get("resources", {}).get("limits", {}).get("memory")
        if shared.get("medium") != "Memory":
            yield f"{path}: /dev/shm in memory"
        elif size and limit and gibibytes(size) > gibibytes(limit) / 2:
            yield f"{path}: /dev/shm counts against the limit of memory, and takes half of it at most"


def nodes_end_with_a_checkpoint(manifest: Manifest) -> Found:
    if not manifest.cluster:
        return
    if manifest.cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield "autoscaler: version v2"
    head = manifest.head["template"]["spec"]
    wait = seconds(head, "RAY_JOB_STOP_WAIT_TIME_S")
    if not 30 < wait < head.get("terminationGracePeriodSeconds", 30) - 30:
        yield f"head: its grace period is longer than {wait} s and the end of Ray"
    hook = head["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
    if hook != ["python", "/scripts/stop_jobs.py"]:
        yield "head: preStop stops the jobs"
    for group in manifest.groups:
        pod = group["template"]["spec"]
        drain = seconds(pod, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
        if not 10 <= drain <= pod.get("terminationGracePeriodSeconds", 30) - 5:
            yield f"{group['groupName']}: its grace period is longer than the drain of {drain} s"
    for path, template in manifest.templates.items():
        if "GroupSpec" in path and template["spec"]["containers"][0].get("command") != COMMAND:
            yield f"{path}: tini passes SIGTERM on to `ray start`, which takes the place of bash"
    for each in manifest.of("RayCluster") + manifest.of("RayJob"):
        if each["metadata"].get("annotations", {}).get("ray.io/overwrite-container-cmd") != "true":
            yield f"{each['kind']}: KubeRay keeps the command of the containers"


def seconds(pod: dict[str, Any], name: str) -> int:
    found = [entry["value"] for entry in pod["containers"][0].get("env", []) if entry["name"] == name]
    return int(found[0]) if found else 0


def the_head_stays(manifest: Manifest) -> Found:
    if not manifest.cluster:
        return
    pod = manifest.head["template"]["spec"]
    terms = node_terms(pod)
    refused = {each["key"]: each["values"] for term in terms for each in term if each["operator"] == "NotIn"}
    if len(terms) != 1 or refused != {label: [value] for label, value in SPOT_LABELS.items()}:
        yield "head: not on a spot node of any cloud"
    if pod.get("tolerations"):
        yield "head: tolerates no taint"
    annotations = manifest.head["template"]["metadata"].get("annotations", {})
    if annotations.get("cluster-autoscaler.kubernetes.io/safe-to-evict") != "false":
        yield "head: no autoscaler of nodes takes its node"


def node_terms(pod: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Expressions of the node affinity that a pod requires. A node must match all of one term."""
    affinity = pod.get("affinity", {}).get("nodeAffinity", {})
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {})
    return [term["matchExpressions"] for term in required.get("nodeSelectorTerms", [])]


def jobs_end_and_start_again(manifest: Manifest) -> Found:
    for each in manifest.of("RayJob") + manifest.of("Job"):
        kind, spec = each["kind"], each["spec"]
        if not spec.get("activeDeadlineSeconds"):
            yield f"{kind}: activeDeadlineSeconds"
        if not spec.get("backoffLimit"):
            yield f"{kind}: backoffLimit"
        (container,) = spec.get("submitterPodTemplate", spec.get("template", {}))["spec"]["containers"]
        if container.get("command") != ["python", "/scripts/submit.py"]:
            yield f"{kind}: submit.py submits, and submits again"
    for each in manifest.of("RayJob"):
        spec = each["spec"]
        if spec.get("shutdownAfterJobFinishes") is not True or "deletionStrategy" in spec:
            yield "RayJob: shutdownAfterJobFinishes deletes the cluster, and no deletionStrategy"
        if spec.get("submissionMode") != "K8sJobMode":
            yield "RayJob: K8sJobMode, which has a submitter"
        if spec["submitterPodTemplate"]["spec"]["containers"][0].get("args") != [spec["entrypoint"]]:
            yield "RayJob: the submitter has the entrypoint"


def one_image(manifest: Manifest) -> Found:
    images = {container["image"] for container, _ in manifest.containers.values() if "image" in container}
    if len(images) != 1 or not all(re.fullmatch(r".+/.+(:[^:/]+|@sha256:[0-9a-f]{64})", image) for image in images):
        yield f"one image of a registry, with a tag or a digest, and not {images}"
    if any(image.endswith(":latest") for image in images):
        yield "an image that stays the same, and not latest"


RULES: list[Callable[[Manifest], Found]] = [
    pods_are_confined,
    volumes_and_settings_exist,
    credentials_are_by_reference,
    no_token_of_kubernetes,
    only_the_cluster_and_its_submitters_reach_it,
    amounts_have_units,
    ray_knows_what_the_pods_have,
    memory_is_shared,
    nodes_end_with_a_checkpoint,
    the_head_stays,
    jobs_end_and_start_again,
    one_image,
]
