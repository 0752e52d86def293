"""KubeRay's own definitions (CRDs), made strict: JSON Schemas that refuse unknown fields, and rules in CEL.

The definitions are files of ray-project/kuberay (Apache-2.0), helm-chart/kuberay-operator/crds/. They are not part of
this repository: `folder` is one on this machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from celpy import CELEvalError, Environment, json_to_cel


@cache
def definition(folder: Path, version: str, kind: str) -> dict[str, Any]:
    """Return the schema of RayCluster or RayJob in v1 of a version of KubeRay."""
    text = (folder / version / f"ray.io_{kind.lower()}s.yaml").read_text()
    versions = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1")
    return strict(schema)


def strict(schema: Any) -> Any:
    """Return an OpenAPI schema as a JSON Schema: fields that it does not list are refused, and quantities are numbers.

    The API server accepts unknown fields in metadata alone, which has a definition of its own.
    """
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        pattern = {"pattern": schema["pattern"]} if "pattern" in schema else {}
        return {"anyOf": [{"type": "integer"}, {"type": "string", **pattern}]}
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and "type" in closed:
        closed.setdefault("additionalProperties", False)
    return closed


def definition_problems(document: dict[str, Any], folder: Path, version: str) -> Iterator[str]:
    """What KubeRay's definition refuses in a RayCluster or a RayJob."""
    schema = definition(folder, version, document["kind"])
    for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
        yield f"KubeRay {version} at {'/'.join(map(str, error.path))}: {error.message}"
    yield from (f"KubeRay {version} at {message}" for message in rule_problems(document, schema))


def rule_problems(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """The rules in CEL that do not hold. Rules about changes (`oldSelf`) do not apply to a new object."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value):
            yield f"{path}: {rule['message']}"
    if isinstance(value, dict):
        for key, child in value.items():
            yield from rule_problems(child, schema.get("properties", {}).get(key, {}), f"{path}/{key}".lstrip("/"))
    if isinstance(value, list):
        for number, child in enumerate(value):
            yield from rule_problems(child, schema.get("items", {}), f"{path}/{number}")


def _holds(rule: str, value: Any) -> bool:
    environment = Environment()
    try:
        return bool(environment.program(environment.compile(rule)).evaluate({"self": json_to_cel(value)}))
    except CELEvalError:
        return False
