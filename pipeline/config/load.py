"""A job file becomes a validated job: YAML with line numbers, environment, overrides, the nearest known key."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.schema import KINDS, Job, TrainJob, TuneJob
from pipeline.errors import ConfigError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
KeyPath = tuple[str | int, ...]


def load(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Job:
    """Read, complete and validate a job file.

    `overrides` maps dotted keys to values, `{"train.workers": 2}`. `${NAME}` and `${NAME:-default}` are read from the
    environment, in values only.

    Raises ConfigError naming file, line, key, and the nearest known key or the expected values.
    """
    path = Path(path)
    values, lines = _read(path)
    for key, value in (overrides or {}).items():
        override(values, key, value)
    job = parse(values, str(path), lines)
    if isinstance(job, TuneJob):
        job = job.model_copy(update={"base": str(path.parent / job.base)})
        base = trial_job(job, {})  # a wrong key of a trial is found now, not in the first trial
        for key in job.space:
            _known(base, key, f"{path}: space")
    return job


def trial_job(sweep: TuneJob, point: Mapping[str, Any]) -> TrainJob:
    """The job of one trial: the base with the sweep's overrides and the trial's point."""
    job = load(sweep.base, {**sweep.overrides, **point})
    if not isinstance(job, TrainJob):
        raise ConfigError(f"{sweep.base} is a {job.kind} job", "the base of a sweep must be of kind: train")
    return job


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`["train.workers=2"]` → `{"train.workers": 2}`; values are YAML."""
    parsed = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"{argument!r} is not an override", "write key=value, for example train.workers=2")
        parsed[key] = yaml.safe_load(value) if value else None
    return parsed


def parse(values: Any, source: str, lines: Mapping[KeyPath, int] | None = None) -> Job:
    """Validate plain values. `source` and `lines` only serve messages."""
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds no keys", "a job file is a YAML mapping that begins with `kind:`")
    kind = values.get("kind")
    if kind not in KINDS:
        place = _place(source, lines or {}, ("kind",))
        raise ConfigError(f"{place}kind is {kind!r}", f"write `kind:` with one of {', '.join(KINDS)}")
    schema = KINDS[kind]
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = [_explain(p, schema, source, lines or {}) for p in error.errors(include_url=False)]
        raise ConfigError("\n".join(problems), "`sagan config --schema` lists every key") from None


def to_yaml(job: Job) -> str:
    """The resolved job, every default visible."""
    return yaml.safe_dump(_plain(job.model_dump(by_alias=True)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# --- YAML ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Any, dict[KeyPath, int]]:
    try:
        text = path.read_text()
    except OSError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        remedy = f"did you mean {path.parent / near[0]}?" if near else "give the path of a job file, e.g. jobs/…"
        raise ConfigError(f"{path} cannot be read: {error.strerror}", remedy) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: {getattr(error, 'problem', error)}", "the file is not valid YAML") from None
    lines: dict[KeyPath, int] = {}
    return (_construct(node, (), path, lines) if node else None), lines


def _construct(node: yaml.Node, at: KeyPath, path: Path, lines: dict[KeyPath, int]) -> Any:
    """The node's value, with environment variables filled in and the line of every key noted."""
    lines[at] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in mapping:
                raise ConfigError(f"{path}:{key_node.start_mark.line + 1}: {key} stands twice", "remove one of them")
            mapping[key] = _construct(value_node, (*at, key), path, lines)
            lines[(*at, key)] = key_node.start_mark.line + 1
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*at, i), path, lines) for i, item in enumerate(node.value)]
    constructor = yaml.SafeLoader("")
    value = constructor.construct_object(node)
    return _substitute(value, path, lines[at]) if isinstance(value, str) else value


def _substitute(text: str, path: Path, line: int) -> Any:
    def value_of(match: re.Match[str]) -> str:
        name, default = match.groups()
        if (value := os.environ.get(name, default)) is None:
            raise ConfigError(
                f"{path}:{line}: ${{{name}}} is not set", f"export {name}=… or write ${{{name}:-default}}"
            )
        return value

    if not _VARIABLE.search(text):
        return text
    filled = _VARIABLE.sub(value_of, text)
    return yaml.safe_load(filled) if filled else None  # so that a variable may stand for a number


def override(values: Any, dotted: str, value: Any) -> None:
    """Set a dotted key of nested mappings, in place."""
    *parents, last = dotted.split(".")
    for key in parents:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[last] = value


# --- Messages --------------------------------------------------------------------------------------------------------


def _explain(problem: Any, schema: type[BaseModel], source: str, lines: Mapping[KeyPath, int]) -> str:
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
    while at and at not in lines:
        at = at[:-1]
    return f"{source}:{lines[at]}: " if at in lines and at else f"{source}: "


def keys(schema: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a schema, sections included."""
    found: list[str] = []
    for name, annotation in _fields(schema).items():
        found.append(prefix + name)
        for part in _parts(annotation):
            found += keys(part, f"{prefix}{name}.")
    return found


def _fields(schema: Any) -> dict[str, Any]:
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return {field.alias or name: field.annotation for name, field in schema.model_fields.items()}
    if dataclasses.is_dataclass(schema):
        return {field.name: None for field in dataclasses.fields(schema)}
    return {}


def _parts(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return list(get_args(annotation))
    return [annotation]


def _known(job: TrainJob, key: str, place: str) -> None:
    known = keys(type(job))
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
        raise ConfigError(f"{place}: {key} is not a key of {job.name}", f"did you mean {near[0]}?" if near else "")
