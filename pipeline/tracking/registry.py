"""Versions of a model in MLflow's registry, and who of them is `champion`.

A version's tags say everything that ranking needs: `metric` names the protocol key it was registered under
(`fid/3fa9c1d2`), a tag of that name holds the value, `better` is `lower` or `higher` and speaks of that key alone,
`withdrawn` holds a reason.
Aliases have no compare-and-swap, so promotion sets and looks again until what it sees agrees with what it set.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CorruptError, EnvironmentFault, SaganError, UsageError
from pipeline.storage import fileset
from pipeline.tracking.tracker import client

log = logging.getLogger(__name__)

CHAMPION = "champion"
ATTEMPTS = 10  # of what rivals may undo
MOST_VERSIONS = 200_000  # MLflow lists no more at once


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    number: int
    ready: bool
    tags: dict[str, str]

    @property
    def metric(self) -> str:
        """Protocol key that it was registered under."""
        return self.tags.get("metric", "")

    def compares(self, judge: Version) -> bool:
        """Whether it has a score under the protocol key that `judge` was registered under."""
        return judge.metric in self.tags

    def rank(self, judge: Version) -> float:
        """By the score under the protocol key of `judge`: lower is better, infinite without one."""
        if not self.compares(judge):
            return math.inf
        value = float(self.tags[judge.metric])
        return -value if judge.tags.get("better") == "higher" else value

    def described(self, judge: Version) -> str:
        """Its scores under its own protocol key and under that of `judge`, and the protocol it was registered under."""
        keys = dict.fromkeys((self.metric, judge.metric))
        scores = ", ".join(f"{key} = {self.tags[key]}" for key in keys if key in self.tags)
        return f"version {self.number}: {scores}\n    {self.tags.get('protocol', 'no protocol')}"


def register(uri: str, name: str, folder: Path, run_id: str, tags: dict[str, str]) -> int:
    """The version of `name` that holds the model in `folder`; made unless there is one of the same checkpoint.

    `folder` is what `Model.save` wrote, with README.md and samples.png. Of the tags, `checkpoint_sha256` identifies the
    model; `metric`, `better` and the value rank it. Raises EnvironmentFault.
    """
    with _errors_explained(uri):
        mlflow = client(uri)
        _ensure_model(mlflow, name)
        for version in versions(uri, name):
            if version.ready and version.tags.get("checkpoint_sha256") == tags["checkpoint_sha256"]:
                return version.number
        experiment = mlflow.get_run(run_id).info.experiment_id
        logged = mlflow.create_logged_model(experiment, name="generator", source_run_id=run_id)
        with tempfile.TemporaryDirectory(prefix="sagan-register-") as temp:
            mlflow.log_model_artifacts(logged.model_id, str(_packaged(folder, Path(temp) / "model")))
        mlflow.finalize_logged_model(logged.model_id, "READY")
        made = _create_version(mlflow, name, logged, run_id, tags)
        log.info("registered %s version %d", name, made)
        return made


def promote_best(uri: str, name: str) -> int | None:
    """Set `champion` to the best READY version that is not withdrawn; returns the champion's number, None without one.

    Compared are versions with a score under the newest version's protocol key. A champion without one cannot be
    compared and stays. Raises EnvironmentFault.
    """
    from mlflow.exceptions import MlflowException

    with _errors_explained(uri):
        mlflow = client(uri)
        for _ in range(ATTEMPTS):
            eligible = [v for v in versions(uri, name) if v.ready and "withdrawn" not in v.tags]
            champion = champion_of(uri, name)
            if not eligible:
                return champion.number if champion else None
            newest = eligible[-1]
            if champion and "withdrawn" not in champion.tags and not champion.compares(newest):
                log.warning(
                    "champion of %s stays version %d: it has no score under %s; compare by hand (sagan promote)",
                    name,
                    champion.number,
                    newest.metric,
                )
                return champion.number
            best = min(eligible, key=lambda version: (version.rank(newest), version.number))
            if champion and champion.number == best.number:
                return best.number
            with suppress(MlflowException):  # a rival set it at the same moment
                mlflow.set_registered_model_alias(name, CHAMPION, str(best.number))
    raise SaganError(
        f"champion of {name} could not be moved in {ATTEMPTS} attempts", f"sagan promote {name} {best.number}"
    )


def promote(uri: str, name: str, version: int, force_reason: str | None = None) -> int:
    """Set `champion` by hand; returns the version.

    Without a reason only to a better one under the champion's protocol. With one, versions that are newer or would win
    are tagged withdrawn, so that the next promotion does not bring them back. Raises UsageError, EnvironmentFault.
    """
    with _errors_explained(uri):
        mlflow = client(uri)
        all_versions = versions(uri, name)
        chosen = next((v for v in all_versions if v.number == version and v.ready), None)
        if chosen is None:
            numbers = ", ".join(str(v.number) for v in all_versions if v.ready) or "none"
            raise UsageError(f"{name} has no version {version} that is ready", f"choose one of: {numbers}")
        champion = champion_of(uri, name)
        if force_reason is None and champion is not None and champion.number != version:
            _require_better(name, chosen, champion)
        if force_reason is not None:
            for other in all_versions:
                wins = other.rank(chosen) < chosen.rank(chosen)
                if other.number > version or wins:
                    mlflow.set_model_version_tag(name, str(other.number), "withdrawn", force_reason)
            mlflow.set_model_version_tag(name, str(version), "promoted", force_reason)
        if "withdrawn" in chosen.tags:
            mlflow.delete_model_version_tag(name, str(version), "withdrawn")
        mlflow.set_registered_model_alias(name, CHAMPION, str(version))
        return version


def _require_better(name: str, chosen: Version, champion: Version) -> None:
    if not chosen.compares(champion):
        said = "was scored under another protocol than its champion: the two do not compare"
    elif chosen.rank(champion) >= champion.rank(champion):
        said = "is not better than its champion under the same protocol"
    else:
        return
    raise UsageError(
        f"version {chosen.number} of {name} {said}\n  {chosen.described(champion)}\n  {champion.described(champion)}",
        f'give a reason to promote it all the same: sagan promote {name} {chosen.number} --force "…"',
    )


def pull(uri: str, model_uri: str, destination: Path) -> Path:
    """Bring `models:/NAME@ALIAS` or `models:/NAME/VERSION` into the folder `destination`; returns it.

    It then holds generator.safetensors, config.json, code/sagan/, README.md, samples.png and MLflow's own files. An
    earlier pull there is replaced. Raises UsageError, EnvironmentFault.
    """
    destination = Path(destination)
    if destination.exists() and not (destination / "generator.safetensors").exists() and any(destination.iterdir()):
        raise UsageError(f"{destination} is not empty and holds no model", "choose another folder")
    with _errors_explained(uri):
        from mlflow.artifacts import download_artifacts

        name, number = _resolve(uri, model_uri)
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=destination.parent) as temp:
            source = client(uri).get_model_version_download_uri(name, str(number))
            folder = download_artifacts(source, dst_path=f"{temp}/model", tracking_uri=uri)
            if destination.exists():
                shutil.rmtree(destination)
            shutil.move(folder, destination)
    return destination


def pull_checkpoint(uri: str, model_uri: str, destination: Path) -> Path:
    """Bring the checkpoint that a version was made from, the whole training state, into `destination`; returns it.

    Raises UsageError, EnvironmentFault, CorruptError where it is gone or is not what was registered.
    """
    if destination.exists() and any(destination.iterdir()):
        raise UsageError(f"{destination} is not empty", "choose another folder")
    with _errors_explained(uri):
        name, number = _resolve(uri, model_uri)
        tags = next(version.tags for version in versions(uri, name) if version.number == number)
    try:
        manifest = fileset.fetch(tags["checkpoint"], destination)
    except (FileNotFoundError, KeyError):
        raise CorruptError(
            f"the checkpoint of {name} version {number} is gone: {tags.get('checkpoint', 'its version names none')}",
            f"the generator alone is still there: sagan pull {model_uri} {destination}",
        ) from None
    if manifest.digest != tags["checkpoint_sha256"]:
        raise CorruptError(f"{tags['checkpoint']} is not the checkpoint that {name} version {number} was made from")
    return destination


def versions(uri: str, name: str) -> list[Version]:
    """All versions by number; [] where there is no such model."""
    found = client(uri).search_model_versions(f"name = '{name}'", max_results=MOST_VERSIONS)
    return sorted(map(_version, found), key=lambda version: version.number)


def champion_of(uri: str, name: str, alias: str = CHAMPION) -> Version | None:
    """The version that has the alias; None where there is no such model or alias."""
    from mlflow.exceptions import MlflowException

    try:
        return _version(client(uri).get_model_version_by_alias(name, alias))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def checkpoints(uri: str, name: str) -> set[str]:
    """URLs of the checkpoints that versions were made from. Raises EnvironmentFault."""
    with _errors_explained(uri):
        return {version.tags["checkpoint"] for version in versions(uri, name) if "checkpoint" in version.tags}


def add_score(uri: str, name: str, version: int, metric: str, value: float) -> None:
    """Note a version's score under another protocol key, so that it can be compared. Raises EnvironmentFault."""
    with _errors_explained(uri):
        client(uri).set_model_version_tag(name, str(version), metric, repr(value))


def _version(found: Any) -> Version:
    return Version(int(found.version), found.status == "READY", dict(found.tags))


def _resolve(uri: str, model_uri: str) -> tuple[str, int]:
    """Name and number of `models:/NAME@ALIAS` or `models:/NAME/VERSION`. Raises UsageError."""
    match = re.fullmatch(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<number>\d+))", model_uri)
    if match is None:
        raise UsageError(f"{model_uri} names no model", "write models:/NAME@champion or models:/NAME/VERSION")
    name, alias = match["name"], match["alias"]
    known = versions(uri, name)
    found = (
        champion_of(uri, name, alias) if alias else next((v for v in known if v.number == int(match["number"])), None)
    )
    if found is None:
        names = ", ".join(model.name for model in client(uri).search_registered_models(max_results=20))
        raise UsageError(
            f"{model_uri} is not in the registry at {uri}",
            f"{name} has versions {', '.join(str(v.number) for v in known)}"
            if known
            else f"there are: {names or 'none'}",
        )
    return name, found.number


def _ensure_model(mlflow: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _create_version(mlflow: Any, name: str, logged: Any, run_id: str, tags: dict[str, str]) -> int:
    """MLflow numbers a version by the highest plus one, which two processes may do at once."""
    from mlflow.exceptions import MlflowException

    source, model_id, attempt = logged.artifact_location, logged.model_id, 0
    while True:
        try:
            made = mlflow.create_model_version(
                name, source, run_id=run_id, model_id=model_id, tags=tags, await_creation_for=0
            )
        except MlflowException:
            attempt += 1
            if attempt == ATTEMPTS:
                raise
        else:
            return int(made.version)


def _packaged(folder: Path, target: Path) -> Path:
    """`folder` as an MLflow model from code: its files stay where they are, MLflow's own come beside them."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, Schema

    inputs = Schema(
        [
            ColSpec(AnyType(), "class", required=False),
            ColSpec(AnyType(), "seed", required=False),  # whole numbers with gaps arrive as floats
            ColSpec("double", "truncation", required=False),
        ]
    )
    outputs = Schema([ColSpec("string", "png"), ColSpec("string", "class")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # asks for an input example, which would run the model here
        mlflow.pyfunc.save_model(
            target,
            python_model=str(Path(__file__).with_name("model.py")),
            code_paths=[str(folder / "code" / "sagan")],
            signature=ModelSignature(inputs, outputs),
            pip_requirements=_requirements(),
        )
    for file in folder.iterdir():
        if file.is_file():
            shutil.copy(file, target / file.name)
    return target


def _requirements() -> list[str]:
    from importlib.metadata import version

    names = ("mlflow", "torch", "numpy", "safetensors", "pillow", "pandas")
    return [f"{name}=={version(name).split('+')[0]}" for name in names]


@contextmanager
def _errors_explained(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise EnvironmentFault(
            f"the model registry at {uri} cannot be used: {reason}",
            "check that MLflow and its artifact store run and can be reached, and track.uri or MLFLOW_TRACKING_URI",
        ) from error
