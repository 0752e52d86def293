"""Job files: reading YAML with line numbers, environment variables, overrides, validation and error messages."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.locations import absolute
from pipeline.config.schema import KINDS, Job, StudyJob, TrainJob, TuneJob
from pipeline.config.text_values import KeyPath, Text, fields, parts, typed
from pipeline.errors import ConfigError

_STANDARD_TAG = "tag:yaml.org,2002:"
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")

# Most characters of a YAML text, its deepest nesting, and the most values. An alias counts as the values that it names.
MOST_TEXT, MOST_DEPTH, MOST_VALUES = 1_000_000, 20, 20_000


@dataclass
class Origin:
    """Where the values of a job come from, for messages.

    Attributes:
        name: File, or what else the values were read from.
        lines: Line of each key.
        variables: `${NAME}` of each value that was taken from an environment variable. Such a value may be a secret.
    """

    name: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def place(self, at: KeyPath) -> str:
        """Return `FILE:LINE: ` for a key, or for the nearest key above it whose line is known."""
        while at and at not in self.lines:
            at = at[:-1]
        return f"{self.name}:{self.lines[at]}: " if at in self.lines and at else f"{self.name}: "

    def without_secrets(self, text: str) -> str:
        """Return a text in which each value of a variable is replaced by the variable's name."""
        for value, variable in sorted(self.variables.items(), key=lambda item: -len(item[0])):
            for form in dict.fromkeys((value, repr(value)[1:-1])):
                text = variable.join(re.split(rf"(?<!\w){re.escape(form)}(?!\w)", text))
        return text


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
    values, origin = _read(path)
    if isinstance(values, dict):
        for key, value in (overrides or {}).items():
            override(values, key, value)
    job = parse_job(values, origin)
    if isinstance(job, TuneJob):
        job = job.model_copy(update={"base": absolute(str(path.parent / job.base))})
        _require_dotted(job.overrides, f"{path}: overrides")
        base = trial_job(job, {})  # a wrong key is found now and not in the first trial
        for key in job.space:
            _require_known(base, key, f"{path}: space")
        _check_values(job, f"{path}: space")
        _check_schedule(job, base, str(path))
    if isinstance(job, StudyJob):
        job = _with_absolute_bases(job, path.parent)
        _check_rows(job, path)
    return job


def trial_job(sweep: TuneJob, point: Mapping[str, Any]) -> TrainJob:
    """Return the job of one trial: the base with the overrides of the sweep and the point of the trial.

    Raises ConfigError.
    """
    job = load_job(sweep.base, {**sweep.overrides, **point})
    if not isinstance(job, TrainJob):
        raise ConfigError(f"{sweep.base} is a job of kind: {job.kind}", "the base of a sweep must be of kind: train")
    return job


def _check_values(sweep: TuneJob, place: str) -> None:
    """Raise ConfigError where a value of the space cannot be trained. It is found now and not after other trials."""
    for key, choice in sweep.space.items():
        for value in choice.examples:
            try:
                trial_job(sweep, {**sweep.example, key: value})
            except ConfigError as error:
                raise ConfigError(f"{place}.{key}: {error.message}", error.remedy) from None


def _check_schedule(sweep: TuneJob, base: TrainJob, place: str) -> None:
    """Raise ConfigError where the schedule does not fit the length of the trials."""
    kimg, schedule = base.train.kimg, sweep.schedule
    if schedule is not None and schedule.grace_kimg is not None and schedule.grace_kimg > kimg:
        raise ConfigError(
            f"{place}: schedule.grace_kimg is {schedule.grace_kimg:g}, but a trial has only {kimg:g} kimg",
            "give a smaller schedule.grace_kimg, or another length of the trials (overrides.train.kimg)",
        )
    if sweep.pbt is None:
        return
    interval = sweep.pbt.interval_kimg
    step = base.train.batch * base.optim.n_dis
    if not step <= 1000 * interval <= 1000 * kimg / 2:
        raise ConfigError(
            f"{place}: schedule.pbt.interval_kimg is {interval:g}; it must be at least a step, {step / 1000:g}, and at "
            f"most half of train.kimg, {kimg / 2:g}",
            "give another interval, or another length of the trials (overrides.train.kimg)",
        )


def row_job(study: StudyJob, row: str, seed: int, settled: Mapping[str, Any] | None = None) -> TrainJob:
    """Return the job of one run of a study: the row's base with the overrides of the study and of the row.

    The run registers no model unless an override says so, because a study compares methods. Raises ConfigError.

    Args:
        study: The study.
        row: Name of the row.
        seed: Seed of the run.
        settled: Values that the study has found for the row, by dotted key. They win over all overrides.
    """
    base, kimg = study.rows[row].base or study.base, study.rows[row].kimg or study.kimg
    values = {**_row_overrides(study, row), **(settled or {})}
    values |= {"name": f"{study.name}-{row}-{seed}", "seed": seed} | ({"train.kimg": kimg} if kimg else {})
    job = load_job(base, values)
    if not isinstance(job, TrainJob):
        raise ConfigError(f"{base} is a job of kind: {job.kind}", "the base of a row must be of kind: train")
    return job


def row_sweep(study: StudyJob, row: str, settled: Mapping[str, Any] | None = None) -> TuneJob | None:
    """Return the sweep that tunes a row, named STUDY-ROW-tune; None where the row is not tuned. Raises ConfigError.

    Args:
        study: The study.
        row: Name of the row.
        settled: Values that the study has found for the row before, by dotted key.
    """
    tuning = study.tuning(row)
    if tuning is None:
        return None
    kimg = tuning.kimg or study.rows[row].kimg or study.kimg
    values = {
        "kind": "tune",
        "name": f"{study.name}-{row}-tune",
        "base": study.rows[row].base or study.base,
        "overrides": {
            **_row_overrides(study, row),
            **(settled or {}),
            "seed": tuning.seed,
            **({"train.kimg": kimg} if kimg else {}),
        },
        **tuning.model_dump(mode="json", include={"search", "schedule"}),
        "space": {key: choice.model_dump(mode="json", exclude_none=True) for key, choice in tuning.space.items()},
    }
    sweep = parse_job(values, f"the sweep of {row}")
    assert isinstance(sweep, TuneJob)
    return sweep


def _row_overrides(study: StudyJob, row: str) -> dict[str, Any]:
    return {"track.register": False, **study.overrides, **study.rows[row].overrides}


def _with_absolute_bases(study: StudyJob, folder: Path) -> StudyJob:
    """Return a study in which the paths of base jobs, which are relative to `folder`, are absolute."""
    rows = {
        name: row if row.base is None else row.model_copy(update={"base": absolute(str(folder / row.base))})
        for name, row in study.rows.items()
    }
    return study.model_copy(update={"base": absolute(str(folder / study.base)), "rows": rows})


def _require_dotted(overrides: Mapping[str, Any], place: str) -> None:
    """Raise ConfigError where overrides have a section, which would replace all keys of the section in the base job."""
    for key, value in overrides.items():
        if isinstance(value, Mapping) and any(map(fields, parts(fields(TrainJob).get(key)))):
            name = next(iter(value), "KEY")
            raise ConfigError(
                f"{place}.{key} is a mapping, which would replace the whole section {key}",
                f"write the keys of the section one by one, as {key}.{name}: …",
            )


def _check_rows(study: StudyJob, path: Path) -> None:
    """Check every run of a study before the first one starts. Raises ConfigError that names the row."""
    _require_dotted(study.overrides, f"{path}: overrides")
    places: dict[str, tuple[str, str | None, str]] = {}
    for row in study.rows:
        _require_dotted(study.rows[row].overrides, f"{path}: rows.{row}.overrides")
        try:
            job, *_ = (row_job(study, row, seed) for seed in study.seeds)
            if sweep := row_sweep(study, row):
                for key in sweep.space:
                    _require_known(job, key, "tune.space")
                _check_values(sweep, "tune.space")
                _check_schedule(sweep, trial_job(sweep, sweep.example), sweep.name)
        except ConfigError as error:
            raise ConfigError(f"{path}: rows.{row}: {error.message}", error.remedy) from None
        places[row] = (job.checkpoint.root, job.track.uri, job.track.experiment)
    for row, place in places.items():
        if place != places[study.compare.reference]:
            raise ConfigError(
                f"{path}: rows.{row} and rows.{study.compare.reference} differ in checkpoint.root, track.uri or "
                "track.experiment",
                "keep all runs of a study in one place: set the key in `overrides` of the study",
            )


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


def parse_job(values: Any, origin: Origin | str) -> Job:
    """Validate the values of a job. Messages of ConfigError name their origin and the line of a key."""
    origin = Origin(origin) if isinstance(origin, str) else origin
    if not isinstance(values, dict):
        raise ConfigError(f"{origin.name} holds no keys", "a job file is a YAML mapping that begins with `kind:`")
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(
            f"{origin.place(('kind',))}kind is {origin.without_secrets(repr(kind))}",
            f"write `kind:` with one of {', '.join(KINDS)}",
        )
    schema = KINDS[kind]

    def not_yaml(at: KeyPath, problem: str) -> ConfigError:
        key = ".".join(map(str, at))
        return ConfigError(f"{origin.place(at)}{key}: {origin.without_secrets(problem)}", "correct the YAML")

    try:
        return schema.model_validate(typed(values, schema, not_yaml))
    except ValidationError as error:
        problems = [_explain(problem, schema, origin) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(problems), "`sagan config --schema` lists every key") from None


def to_yaml(job: Job) -> str:
    """Return a job as YAML with every default."""
    return yaml.safe_dump(_plain(job.model_dump(by_alias=True)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# --- YAML ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Any, Origin]:
    """Return the values of a YAML file and their origin. Raises ConfigError."""
    origin = Origin(str(path))
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_TEXT + 1)
    except OSError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        remedy = f"did you mean {path.parent / near[0]}?" if near else "give the path of a job file, e.g. jobs/…"
        raise ConfigError(f"{path} cannot be read: {error.strerror}", remedy) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason}", "save the file as UTF-8") from None
    return _read_text(text, origin), origin


def _read_text(text: str, origin: Origin) -> Any:
    """Return the values of a YAML text, and add the line of each key to `origin`. Raises ConfigError.

    The size, the nesting and the number of values are bounded before values are built.
    """
    if len(text) > MOST_TEXT:
        raise ConfigError(f"{origin.name} is longer than {MOST_TEXT:,} characters", "give the path of a job file")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH:
                raise _too_deep(origin, event.start_mark.line + 1 if event.start_mark else 1)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{origin.name}{line}: {getattr(error, 'problem', error)}", "correct the YAML") from None
    return _Values(origin).of(node, ()) if node else None


def _too_deep(origin: Origin, line: int) -> ConfigError:
    return ConfigError(
        f"{origin.name}:{line}: values are nested more than {MOST_DEPTH} deep", "remove the nesting, or the alias (*…)"
    )


class _Values:
    """Builds the values of YAML nodes, with environment variables filled in, and stores the line of each key."""

    def __init__(self, origin: Origin) -> None:
        self.origin, self.count = origin, 0

    def of(self, node: yaml.Node, at: KeyPath) -> Any:
        """Return the value of a node at a key path. Raises ConfigError."""
        line = node.start_mark.line + 1
        self.origin.lines[at] = line
        self.count += 1
        if len(at) > MOST_DEPTH:  # an alias may name a node that contains it
            raise _too_deep(self.origin, line)
        if self.count > MOST_VALUES:
            raise ConfigError(f"{self.origin.name}:{line}: more than {MOST_VALUES:,} values", "remove aliases (*…)")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, at)
        if isinstance(node, yaml.SequenceNode):
            return [self.of(item, (*at, i)) for i, item in enumerate(node.value)]
        return self._scalar(node, line)

    def _mapping(self, node: yaml.MappingNode, at: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.origin.name}:{line}: a key is not a text", "write `key: value`")
            key = str(key_node.value)
            if key in mapping:
                raise ConfigError(f"{self.origin.name}:{line}: {key} occurs twice", "remove one of them")
            mapping[key] = self.of(value_node, (*at, key))
            self.origin.lines[(*at, key)] = line
        return mapping

    def _scalar(self, node: yaml.Node, line: int) -> Any:
        """Return the text of a scalar, whose meaning depends on its key; None for null. Raises ConfigError."""
        assert isinstance(node, yaml.ScalarNode)
        if not node.tag.startswith(_STANDARD_TAG):
            tag = _shortened(repr(node.tag))
            raise ConfigError(
                f"{self.origin.name}:{line}: could not determine a constructor for the tag {tag}", "correct the YAML"
            )
        if node.tag == f"{_STANDARD_TAG}null":
            return None
        if VARIABLE.search(node.value):  # a variable may stand for a number
            return Text(self._substitute(node.value, line))
        return Text(node.value) if node.style is None else node.value

    def _substitute(self, text: str, line: int) -> str:
        """Return a text with environment variables filled in. Raises ConfigError where a variable is not set."""

        def value_of(match: re.Match[str]) -> str:
            name, default = match.groups()
            given = os.environ.get(name)
            value = given or default if default is not None else given  # as in a shell: the default also for ""
            if value is None:
                raise ConfigError(
                    f"{self.origin.name}:{line}: ${{{name}}} is not set",
                    f"export {name}=… or write ${{{name}:-default}}",
                )
            if given:
                self.origin.variables[value] = f"${{{name}}}"
            return value

        filled = VARIABLE.sub(value_of, text)
        if any(name in os.environ for name, _ in VARIABLE.findall(text)):
            self.origin.variables.setdefault(filled, text)
        return filled


def override(values: Any, dotted: str, value: Any) -> None:
    """Set the value of a dotted key in nested mappings, in place.

    The keys of a mapping `overrides` are dotted themselves: `overrides.train.kimg` is the key `train.kimg` of it.
    """
    before, found, below = f".{dotted}".partition(".overrides.")
    *parents, last = [*before.split(".")[1:], "overrides", below] if found else dotted.split(".")
    for key in parents:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[last] = value


# --- Messages --------------------------------------------------------------------------------------------------------


def _explain(problem: Any, schema: type[BaseModel], origin: Origin) -> str:
    """Return the message for one of pydantic's errors, with file, line and key."""
    at = tuple(part for part in problem["loc"])
    key = ".".join(map(str, at)) or "job"
    place = origin.place(at)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(key, keys(schema), 1, cutoff=0.5)
        return f"{place}{key} is not a key" + (f"; did you mean {near[0]}?" if near else "")
    if problem["type"] in ("missing", "missing_argument"):
        return f"{place}{key} is missing"
    if problem["type"] == "value_error":
        message = origin.without_secrets(str(problem["ctx"]["error"]))
        return f"{place}{message}" if "." in message.split(" ")[0] else f"{place}{key}: {message}"
    value, reason = _shortened(origin.without_secrets(repr(problem["input"]))), problem["msg"]
    return f"{place}{key} is {value}: {reason[0].lower()}{reason[1:]}"


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


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
