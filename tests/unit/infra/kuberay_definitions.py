"""KubeRay's own definitions (CRDs), made strict: JSON Schemas that refuse unknown fields, and rules in CEL.

`kuberay_definitions.json.xz` holds the definitions of RayCluster and RayJob in v1, without descriptions, by version of
KubeRay. They are files of ray-project/kuberay (Apache-2.0), helm-chart/kuberay-operator/crds/. This command makes the
file from a folder `<version>/` for each version:

    python -m tests.unit.infra.kuberay_definitions FOLDER
"""

from __future__ import annotations

import json
import lzma
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from celpy import CELEvalError, Environment, json_to_cel

VERSIONS = ("v1.5.1", "v1.7.0")
_FILE = Path(__file__).with_suffix(".json.xz")


@cache
def _definitions() -> dict[str, dict[str, dict[str, Any]]]:
    stored = json.loads(lzma.decompress(_FILE.read_bytes()))
    return {version: {kind: strict(schema) for kind, schema in kinds.items()} for version, kinds in stored.items()}


def _read(folder: Path, version: str, kind: str) -> Any:
    """Return the schema of a definition that KubeRay ships, without descriptions."""
    text = (folder / version / f"ray.io_{kind.lower()}s.yaml").read_text()
    versions = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1")
    return _without_descriptions(schema)


def _without_descriptions(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_descriptions(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    # A text is a description. A schema under this key belongs to a field of this name.
    kept = {key: value for key, value in schema.items() if key != "description" or isinstance(value, dict)}
    return {key: _without_descriptions(value) for key, value in kept.items()}


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


def definition_problems(document: dict[str, Any]) -> Iterator[str]:
    """What the definitions of the versions refuse in a RayCluster or a RayJob. Each message occurs once."""
    found = (message for version in VERSIONS for message in _problems(document, version))
    yield from dict.fromkeys(found)


def _problems(document: dict[str, Any], version: str) -> Iterator[str]:
    kind = document["kind"]
    schema = _definitions()[version][kind]
    for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
        yield f"{kind} at {'/'.join(map(str, error.path))}: {error.message}"
    yield from (f"{kind} at {message}" for message in rule_problems(document, schema))


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


if __name__ == "__main__":
    made = {
        version: {kind: _read(Path(sys.argv[1]), version, kind) for kind in ("RayCluster", "RayJob")}
        for version in VERSIONS
    }
    _FILE.write_bytes(lzma.compress(json.dumps(made, separators=(",", ":")).encode(), preset=9))
