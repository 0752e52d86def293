"""Job files: reading YAML with line numbers, environment variables, overrides, validation and error messages.

The module also writes the JSON schema of job files, for editors.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from pipeline.config.schema import KINDS, Job, TrainJob, TuneJob, absolute
from pipeline.config.text_values import KeyPath, Text, fields, parts, typed
from pipeline.errors import ConfigError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def load_job(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Job:
    """Read a job file, fill in environment variables, overrides and defaults, and validate it.

    `${NAME}` and `${NAME:-default}` in values are replaced by environment variables. The type of a key decides whether
    a value is text or YAML (see `text_values`).

    Args:
        path: Path of the file.
        overrides: Values by dotted key, such as `{"train.workers": 2}`.

    Raises ConfigError that names file, line and key, with the nearest known key or the expected values.
    """
    path = Path(path)
    values, lines = _read(path)
    if isinstance(values, dict):
        for key, value in (overrides or {}).items():
            override(values, key, value)
    job = parse_job(values, str(path), lines)
    if isinstance(job, TuneJob):
        job = job.model_copy(update={"base": absolute(str(path.parent / job.base))})
        base = trial_job(job, {})  # a wrong key is found now and not in the first trial
        for key in job.space:
            _require_known(base, key, f"{path}: space")
    return job


def trial_job(sweep: TuneJob, point: Mapping[str, Any]) -> TrainJob:
    """Return the job of one trial: the base with the overrides of the sweep and the point of the trial.

    Raises ConfigError.
    """
    job = load_job(sweep.base, {**sweep.overrides, **point})
    if not isinstance(job, TrainJob):
        raise ConfigError(f"{sweep.base} is a job of kind: {job.kind}", "the base of a sweep must be of kind: train")
    return job


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Split overrides: `["train.workers=2"]` → `{"train.workers": "2"}`. Raises ConfigError.

    A value is a `Text`, which `load_job` takes verbatim or as YAML.
    """
    parsed: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"{argument!r} is not an override", "write key=value, for example train.workers=2")
        parsed[key] = Text(value)
    return parsed


def parse_job(values: Any, source: str, lines: Mapping[KeyPath, int] | None = None) -> Job:
    """Validate the values of a job. Messages of ConfigError name `source` and the line of a key in `lines`."""
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds no keys", "a job file is a YAML mapping that begins with `kind:`")
    kind = values.get("kind")
    if kind not in KINDS:
        place = _place(source, lines or {}, ("kind",))
        raise ConfigError(f"{place}kind is {kind!r}", f"write `kind:` with one of {', '.join(KINDS)}")
    schema = KINDS[kind]

    def not_yaml(at: KeyPath, problem: str) -> ConfigError:
        return ConfigError(f"{_place(source, lines or {}, at)}{'.'.join(map(str, at))}: {problem}", "correct the YAML")

    try:
        return schema.model_validate(typed(values, schema, not_yaml))
    except ValidationError as error:
        problems = [_explain(p, schema, source, lines or {}) for p in error.errors(include_url=False)]
        raise ConfigError("\n".join(problems), "`sagan config --schema` lists every key") from None


def to_yaml(job: Job) -> str:
    """Return a job as YAML with every default."""
    return yaml.safe_dump(_plain(job.model_dump(by_alias=True)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# --- YAML ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Any, dict[KeyPath, int]]:
    """Return the values of a YAML file and the line of each key. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}", "save the file as UTF-8") from None
    except OSError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        remedy = f"did you mean {path.parent / near[0]}?" if near else "give the path of a job file, e.g. jobs/…"
        raise ConfigError(f"{path} cannot be read: {error.strerror}", remedy) from None
    lines: dict[KeyPath, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return (_construct(node, (), path, lines) if node else None), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: {getattr(error, 'problem', error)}", "correct the YAML") from None


def _construct(node: yaml.Node, at: KeyPath, path: Path, lines: dict[KeyPath, int]) -> Any:
    """Return the value of a YAML node with environment variables filled in, and store the line of each key."""
    lines[at] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in mapping:
                raise ConfigError(f"{path}:{key_node.start_mark.line + 1}: {key} occurs twice", "remove one of them")
            mapping[key] = _construct(value_node, (*at, key), path, lines)
            lines[(*at, key)] = key_node.start_mark.line + 1
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*at, i), path, lines) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    if yaml.SafeLoader("").construct_object(node) is None:
        return None
    if _VARIABLE.search(node.value):  # a variable may stand for a number
        return Text(_substitute(node.value, path, lines[at]))
    return Text(node.value) if node.style is None else node.value


def _substitute(text: str, path: Path, line: int) -> str:
    """Return a text with environment variables filled in. Raises ConfigError where a variable is not set."""

    def value_of(match: re.Match[str]) -> str:
        name, default = match.groups()
        if (value := os.environ.get(name, default)) is None:
            raise ConfigError(
                f"{path}:{line}: ${{{name}}} is not set", f"export {name}=… or write ${{{name}:-default}}"
            )
        return value

    return _VARIABLE.sub(value_of, text)


def override(values: Any, dotted: str, value: Any) -> None:
    """Set the value of a dotted key in nested mappings, in place."""
    *parents, last = dotted.split(".")
    for key in parents:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[last] = value


# --- JSON schema -----------------------------------------------------------------------------------------------------


def job_schema() -> dict[str, Any]:
    """Return the JSON schema of a job file of any kind. It is the same on every machine."""
    definitions = TypeAdapter(Job).json_schema(schema_generator=_FileSchema)["$defs"]
    for kind, job in KINDS.items():
        definitions[job.__name__]["properties"]["kind"] = {"const": kind}
    return {
        "$schema": _FileSchema.schema_dialect,
        "title": "A job of sagan",
        "type": "object",
        "properties": {"kind": {"enum": list(KINDS)}},
        "required": ["kind"],
        # With one condition per kind instead of a union of all kinds, editors show a mistake at its key.
        "allOf": [
            {
                "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
                "then": {"$ref": f"#/$defs/{job.__name__}"},
            }
            for kind, job in KINDS.items()
        ],
        "$defs": definitions,
    }


class _FileSchema(GenerateJsonSchema):
    """A generator of the schema of job files, in which `${NAME}` may stand for a value of any type."""

    def generate_inner(self, schema: Any) -> JsonSchemaValue:
        described = super().generate_inner(schema)
        if schema["type"] in ("int", "float", "bool", "literal", "list", "tuple") or "pattern" in schema:
            return {"anyOf": [described, {"type": "string", "pattern": _VARIABLE.pattern}]}
        return described

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        default = schema.get("default")
        if isinstance(default, BaseModel) or dataclasses.is_dataclass(default):  # its keys have defaults
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # a title would only repeat the key


# --- Messages --------------------------------------------------------------------------------------------------------


def _explain(problem: Any, schema: type[BaseModel], source: str, lines: Mapping[KeyPath, int]) -> str:
    """Return the message for one of pydantic's errors, with file, line and key."""
    at = tuple(part for part in problem["loc"])
    key = ".".join(map(str, at)) or "job"
    place = _place(source, lines, at)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(key, keys(schema), 1, cutoff=0.5)
        return f"{place}{key} is not a key" + (f"; did you mean {near[0]}?" if near else "")
    if problem["type"] in ("missing", "missing_argument"):
        return f"{place}{key} is missing"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        return f"{place}{message}" if "." in message.split(" ")[0] else f"{place}{key}: {message}"
    return f"{place}{key} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _place(source: str, lines: Mapping[KeyPath, int], at: KeyPath) -> str:
    """Return `FILE:LINE: ` for a key, or for the nearest key above it whose line is known."""
    while at and at not in lines:
        at = at[:-1]
    return f"{source}:{lines[at]}: " if at in lines and at else f"{source}: "


def keys(schema: Any, prefix: str = "") -> list[str]:
    """Return every dotted key of a schema, including the names of sections."""
    dotted: list[str] = []
    for name, annotation in fields(schema).items():
        dotted.append(prefix + name)
        for part in parts(annotation):
            dotted += keys(part, f"{prefix}{name}.")
    return dotted


def _require_known(job: TrainJob, key: str, place: str) -> None:
    """Raise ConfigError where a job has no key of this name."""
    known = keys(type(job))
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
        raise ConfigError(f"{place}: {key} is not a key of {job.name}", f"did you mean {near[0]}?" if near else "")
