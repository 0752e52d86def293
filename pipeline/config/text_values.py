"""Values that are given as text: scalars of a job file, environment variables, and overrides on the command line.

The type of a key decides what a text means. A key that takes text takes it verbatim, whatever characters it has. For
other types the text is YAML.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.config.schema import TrainJob

KeyPath = tuple[str | int, ...]
Fail = Callable[[KeyPath, str], Exception]


class Text(str):
    """A text whose meaning depends on the type of its key."""


def typed(value: Any, schema: type[BaseModel], fail: Fail) -> Any:
    """Return the values of a job in which every `Text` has its meaning.

    Args:
        value: Values of the job. Mappings and lists may hold more values, `Text` among them.
        schema: Type of the job.
        fail: Makes the exception that is raised where a text is not YAML, from the path of the key and the problem.
    """
    return _typed(value, [schema], (), fail)


@functools.cache
def fields(schema: Any) -> dict[str, Any]:
    """Return the types of a section's keys by name; empty where `schema` is not a section."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        hints = typing.get_type_hints(schema)
        return {field.alias or name: hints[name] for name, field in schema.model_fields.items()}
    if isinstance(schema, type) and dataclasses.is_dataclass(schema):
        hints = typing.get_type_hints(schema)
        return {field.name: hints[field.name] for field in dataclasses.fields(schema)}
    return {}


def parts(annotation: Any) -> list[Any]:
    """Return the members of a union, or the type itself."""
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def _typed(value: Any, kinds: Sequence[Any], at: KeyPath, fail: Fail) -> Any:
    if isinstance(value, Text):
        return _meaning(value, kinds, at, fail)
    if isinstance(value, dict):
        return {key: _typed(below, _below(kinds, key), (*at, key), fail) for key, below in value.items()}
    if isinstance(value, list):
        return [_typed(below, _below(kinds, i), (*at, i), fail) for i, below in enumerate(value)]
    return value


def _below(kinds: Sequence[Any], key: str | int) -> list[Any]:
    """Return the types that a value may have in a mapping or a list of one of the types `kinds`; [] if unknown."""
    found: list[Any] = []
    for kind in kinds:
        arguments = get_args(kind)
        if key in (known := fields(kind)):
            found += parts(known[key])
        elif get_origin(kind) is dict and arguments[1] is Any:  # values by dotted key of a training job
            found += _of_key(str(key))
        elif get_origin(kind) is dict:
            found += parts(arguments[1])
        elif get_origin(kind) in (list, tuple) and arguments[0] is not Any:
            found += parts(arguments[0])
    return found


def _of_key(dotted: str) -> list[Any]:
    """Return the types of a dotted key of a training job; [] where there is no such key."""
    kinds: list[Any] = [TrainJob]
    for part in dotted.split("."):
        kinds = _below(kinds, part)
    return kinds


def _meaning(text: Text, kinds: Sequence[Any], at: KeyPath, fail: Fail) -> Any:
    """Return the value of a text for a key that takes one of the types `kinds`; [] where the types are unknown.

    An empty text means null, and so does `null` where the key may be null.
    """
    if not text or (text == "null" and type(None) in kinds):
        return None
    takes_text = any(map(_is_text, kinds))
    others = [kind for kind in kinds if not _is_text(kind) and kind is not type(None)]
    if takes_text and not others:
        return str(text)
    try:
        value = yaml.safe_load(text)
        is_finite = _is_finite(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if others and not takes_text:
            raise fail(at, getattr(error, "problem", None) or "it is not YAML") from None
        return str(text)
    if others and not takes_text and not is_finite:
        raise fail(at, f"{text} is not a finite number")
    if takes_text:
        return value if text[0] in "[{" and any(_fits(value, kind) for kind in others) else str(text)
    return str(text) if isinstance(value, str) else value


def _is_finite(value: Any) -> bool:
    """Return whether every number in a value is finite. A text such as `1e309` may stand for a number too."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return True
    return not isinstance(value, float) or math.isfinite(value)


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)))


def _fits(value: Any, kind: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True
