"""Registers models in MLflow's registry, lists their versions, and downloads them.

Tags of a version hold all values that ranking needs:
    metric: Protocol key under which the version was registered, for example `fid/3fa9c1d2`.
    fid/3fa9c1d2: The value under that protocol key. The tag has the name of the key. A version can have values under
        several protocol keys.
    better: `lower` or `higher`, the direction of the protocol key in `metric`.
    files_sha256: Digest of the manifest of the version's files.
    withdrawn: Reason why the version must not become champion.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import CorruptError, EnvironmentFault, UsageError
from pipeline.storage import file_sets, files, validate_json
from pipeline.storage.home_folders import expanded
from pipeline.tracking import pulled_folder
from pipeline.tracking.mlflow_run import client, first_line, mlflow_errors, refuses_user
from sagan.train_state import FACTS, TENSORS
from sagan.trained_model import Model

log = logging.getLogger(__name__)

CHAMPION = "champion"
FILES_SHA256 = "files_sha256"
ATTEMPTS = 10  # attempts of a change that another process may undo
MOST_VERSIONS = 200_000  # MLflow lists at most this many versions at once
_SHOWN = 20  # models that an error names


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    number: int
    ready: bool
    tags: dict[str, str]

    @property
    def metric(self) -> str:
        """Protocol key under which the version was registered."""
        return self.tags.get("metric", "")

    def compares(self, other: Version) -> bool:
        """Return whether this version has a score, which is a finite number, under the protocol key of `other`."""
        try:
            return math.isfinite(float(self.tags[other.metric]))
        except (KeyError, ValueError):
            return False

    def rank(self, other: Version) -> float:
        """Return the rank under the protocol key of `other`: lower is better, infinity without a score."""
        if not self.compares(other):
            return math.inf
        value = float(self.tags[other.metric])
        return -value if other.tags.get("better") == "higher" else value

    def described(self, other: Version) -> str:
        """Return text with the version's number, its scores under its own key and `other`'s key, and its protocol."""
        keys = dict.fromkeys((self.metric, other.metric))
        scores = ", ".join(f"{key} = {self.tags[key]}" for key in keys if key in self.tags)
        return f"version {self.number}: {scores}\n    {self.tags.get('protocol', 'no protocol')}"


def register(uri: str, name: str, folder: Path, run_id: str, tags: dict[str, str]) -> int:
    """Register the model in `folder` and return the number of its version.

    If a READY version with the same `checkpoint_sha256` exists, the function returns its number and registers nothing.

    Args:
        uri: Tracking URI.
        name: Name of the registered model. It is created where it does not exist.
        folder: Folder that `Model.save` wrote, with README.md and samples.png added. Imported folders have them.
        run_id: Id of the MLflow run that trained the model.
        tags: Tags of the version. `checkpoint_sha256` identifies the model. `metric`, `better` and the value rank it.

    Raises EnvironmentFault.
    """
    with registry_errors(uri):
        mlflow = client(uri)
        _ensure_model(mlflow, name)
        for version in versions(uri, name):
            if version.ready and version.tags.get("checkpoint_sha256") == tags["checkpoint_sha256"]:
                return version.number
        experiment = mlflow.get_run(run_id).info.experiment_id
        logged = mlflow.create_logged_model(experiment, name="generator", source_run_id=run_id)
        with files.temporary_folder("register") as temp:
            model = _packaged(folder, temp / "model")
            manifest = file_sets.Manifest.of(model)
            (model / file_sets.MANIFEST).write_bytes(manifest.to_bytes())
            mlflow.log_model_artifacts(logged.model_id, str(model))
        mlflow.finalize_logged_model(logged.model_id, "READY")
        number = _create_version(mlflow, name, logged, run_id, {**tags, FILES_SHA256: manifest.digest})
        log.info("registered %s version %d", name, number)
        return number


def pull(uri: str, model_uri: str, destination: Path) -> Path:
    """Download the model `models:/NAME@ALIAS` or `models:/NAME/VERSION` into the folder `destination`.

    The folder then contains generator.safetensors, config.json, code/sagan/, README.md, samples.png and the files of
    MLflow. The model of an earlier pull is replaced after the download is complete. Other files are kept.

    Returns the absolute path of the folder. Raises UsageError where the folder holds files and no pulled model. Raises
    CorruptError where the version holds no complete model, where a file was changed after registration, or where the
    version has no list of its files. Raises EnvironmentFault.
    """
    destination = expanded(destination).absolute()
    with pulled_folder.replacing(destination) as folder, registry_errors(uri):
        from mlflow.artifacts import download_artifacts
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        name, version = _resolve(uri, model_uri)
        source = client(uri).get_model_version_download_uri(name, str(version.number))
        with _not_registered(model_uri):
            _require_listed(get_artifact_repository(source, tracking_uri=uri), folder.parent, version.tags)
            Path(download_artifacts(source, dst_path=f"{folder}.part", tracking_uri=uri)).rename(folder)
            _require_registered(folder, version.tags)
        try:
            Model.load(folder)
        except Exception as error:  # any, because the bytes may be anything
            raise CorruptError(f"{name} version {version.number} holds no complete model: {error}") from error
    return destination


@contextmanager
def _not_registered(model_uri: str) -> Iterator[None]:
    """Name the version and what to do where the `with` block raises CorruptError."""
    try:
        yield
    except CorruptError as error:
        remedy = f"pull the training state, which has a digest of its own: sagan pull {model_uri} FOLDER --checkpoint"
        raise CorruptError(f"{model_uri} cannot be pulled: {error.message}", remedy) from None


def _require_listed(repository: Any, temp: Path, tags: dict[str, str]) -> None:
    """Check, before the files of a version are downloaded, that they have the registered names and sizes.

    Args:
        repository: MLflow's artifact repository with the files at its top level.
        temp: Local folder for the manifest.
        tags: Tags of the version.

    Raises CorruptError that names a file.
    """
    if FILES_SHA256 not in tags:
        raise CorruptError(
            f"it has no tag {FILES_SHA256}: an older version of sagan registered it, and its files cannot be checked"
        )
    # A server through which files pass leaves out the size of an empty file.
    sizes = {entry.path: entry.file_size or 0 for entry in repository.list_artifacts() if not entry.is_dir}
    if sizes.get(file_sets.MANIFEST, 0) > validate_json.MOST_BYTES:
        raise CorruptError(f"{file_sets.MANIFEST} has more than {validate_json.MOST_BYTES:,} bytes")
    manifest = None
    if file_sets.MANIFEST in sizes:
        manifest = file_sets.read_manifest(str(Path(repository.download_artifacts(file_sets.MANIFEST, temp)).parent))
    if manifest is None or manifest.digest != tags[FILES_SHA256]:
        raise CorruptError(f"{file_sets.MANIFEST} is not the one that was registered")
    folders = {str(folder) for name in manifest.files for folder in PurePosixPath(name).parents} - {"."}
    for folder in [None, *sorted(folders)]:
        for entry in repository.list_artifacts(folder):
            if entry.is_dir and entry.path not in folders:
                raise CorruptError(f"{validate_json.printable(entry.path)} was added")
            if not entry.is_dir:
                sizes[entry.path] = entry.file_size or 0
    del sizes[file_sets.MANIFEST]
    for name in sorted(sizes.keys() | manifest.files.keys()):
        if name not in manifest.files:
            raise CorruptError(f"{validate_json.printable(name)} was added")
        if name not in sizes:
            raise CorruptError(f"{name} is missing")
        if sizes[name] != manifest.files[name].size:
            raise CorruptError(f"{name} has {sizes[name]} bytes instead of {manifest.files[name].size}")


def _require_registered(folder: Path, tags: dict[str, str]) -> None:
    """Check that a downloaded folder holds exactly the files that were registered. Raises CorruptError."""
    manifest = file_sets.read_manifest(str(folder))
    if manifest is None or manifest.digest != tags[FILES_SHA256]:
        raise CorruptError(f"{file_sets.MANIFEST} is not the one that was registered")
    try:
        file_sets.check_local_set(folder, complete=True)
    except CorruptError as error:
        raise CorruptError(error.message.replace(f"{folder}/", "", 1)) from None


def pull_checkpoint(uri: str, model_uri: str, destination: Path) -> Path:
    """Download the checkpoint of a version, which is the whole training state, into the empty folder `destination`.

    Returns the absolute path of the folder. Raises UsageError, EnvironmentFault. Raises CorruptError where the
    checkpoint does not exist any more or is not the one that was registered.
    """
    destination = expanded(destination).absolute()
    pulled_folder.require_empty(destination)
    url = checkpoint_of(uri, model_uri, f"pull the generator alone: sagan pull {model_uri} {destination}")
    file_sets.fetch_set(url, destination)
    return destination


def checkpoint_of(uri: str, model_uri: str, remedy: str) -> str:
    """Return the URL of the checkpoint from which a version was exported.

    Raises UsageError, EnvironmentFault. Raises CorruptError where the checkpoint is not the one that was registered,
    and, with `remedy`, where it does not exist any more.
    """
    with registry_errors(uri):
        name, version = _resolve(uri, model_uri)
    url = version.tags.get("checkpoint")
    if url is None or (manifest := file_sets.read_manifest(url)) is None:
        raise CorruptError(
            f"the checkpoint of {name} version {version.number} does not exist: "
            f"{url or 'the version names no checkpoint'}",
            remedy,
        )
    if manifest.digest != version.tags.get("checkpoint_sha256"):
        raise CorruptError(f"{url} is not the checkpoint from which {name} version {version.number} was exported")
    if missing := sorted({TENSORS, FACTS} - manifest.files.keys()):
        raise CorruptError(f"the checkpoint {url} has no {missing[0]}")
    return url


def versions(uri: str, name: str) -> list[Version]:
    """Return all versions of a model, sorted by number; [] where there is no such model.

    Raises UsageError where the name has quotes: the names of models that sagan registers have none, and in a filter of
    MLflow they would end the name.
    """
    if "'" in name or '"' in name:
        raise UsageError(f"the name of a model has quotes: {name}", "give the name of a model that sagan registered")
    entries = client(uri).search_model_versions(f"name = '{name}'", max_results=MOST_VERSIONS)
    return sorted(map(version_of, entries), key=lambda version: version.number)


def champion_of(uri: str, name: str, alias: str = CHAMPION) -> Version | None:
    """Return the version that has the alias; None where there is no such model or alias."""
    from mlflow.exceptions import MlflowException

    try:
        return version_of(client(uri).get_model_version_by_alias(name, alias))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def checkpoints(uri: str, name: str) -> set[str]:
    """Return the URLs of the checkpoints from which versions were exported. Raises EnvironmentFault."""
    with registry_errors(uri):
        return {version.tags["checkpoint"] for version in versions(uri, name) if "checkpoint" in version.tags}


def add_score(uri: str, name: str, version: int, metric: str, value: float) -> None:
    """Store a score of a version under the protocol key `metric`, so that it can be compared with other versions.

    Raises EnvironmentFault.
    """
    with registry_errors(uri):
        client(uri).set_model_version_tag(name, str(version), metric, repr(value))


def version_of(entry: Any) -> Version:
    """Return a version that the server listed. Raises CorruptError where its number is none."""
    if not re.fullmatch("[0-9]{1,9}", number := str(entry.version)):
        raise CorruptError(f"the registry lists a version of {entry.name!r} with the number {number[:80]!r}")
    return Version(int(number), entry.status == "READY", dict(entry.tags))


def numbered(uri: str, model_uri: str) -> str:
    """Return `models:/NAME/VERSION` for `models:/NAME@ALIAS`, whose version may change. Raises UsageError."""
    with registry_errors(uri):
        name, version = _resolve(uri, model_uri)
    return f"models:/{name}/{version.number}"


def _resolve(uri: str, model_uri: str) -> tuple[str, Version]:
    """Return the name and the version of `models:/NAME@ALIAS` or `models:/NAME/VERSION`. Raises UsageError."""
    match = re.fullmatch(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<number>\d+))", model_uri)
    if match is None:
        raise UsageError(f"{model_uri} is not a model URI", "write models:/NAME@champion or models:/NAME/VERSION")
    name, alias = match["name"], match["alias"]
    known = versions(uri, name)
    version = (
        champion_of(uri, name, alias) if alias else next((v for v in known if v.number == int(match["number"])), None)
    )
    if version is None:
        raise UsageError(f"{model_uri} is not in the registry at {uri}", _choice(uri, name, known))
    return name, version


def _choice(uri: str, name: str, known: Sequence[Version]) -> str:
    """Return what to choose instead of a version of model `name` that does not exist. `known` are those that do."""
    if known:
        return f"choose one of the versions of {name}: {', '.join(str(version.number) for version in known)}"
    newest = client(uri).search_registered_models(max_results=_SHOWN, order_by=["last_updated_timestamp DESC"])
    if not newest:
        return "train with track.register: true; the registry has no model yet"
    return f"choose one of the registered models; the newest are {', '.join(model.name for model in newest)}"


def _ensure_model(mlflow: Any, name: str) -> None:
    """Create the registered model where it does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _create_version(mlflow: Any, name: str, logged: Any, run_id: str, tags: dict[str, str]) -> int:
    """Create a version and return its number.

    MLflow gives a version the highest number plus one. Two processes may choose the same number at once. One of them
    then gets an error, and this function repeats the call.
    """
    from mlflow.exceptions import MlflowException

    source, model_id, attempt = logged.artifact_location, logged.model_id, 0
    while True:
        try:
            created = mlflow.create_model_version(
                name, source, run_id=run_id, model_id=model_id, tags=tags, await_creation_for=0
            )
        except MlflowException:
            attempt += 1
            if attempt == ATTEMPTS:
                raise
        else:
            return int(created.version)


def _packaged(folder: Path, target: Path) -> Path:
    """Write an MLflow model from code to `target`, with the files of `folder` at its top level. Return `target`."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    # The model checks its rows itself. With a schema of inputs, MLflow would drop empty rows, as in [{}, {}].
    outputs = Schema([ColSpec("string", "png"), ColSpec("string", "class")])
    with warnings.catch_warnings():
        # MLflow warns that there is no input example. With an example, MLflow would run the model here.
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.save_model(
            target,
            python_model=str(Path(__file__).with_name("served_model.py")),
            code_paths=[str(folder / "code" / "sagan")],
            signature=ModelSignature(outputs=outputs),
            pip_requirements=_requirements(),
        )
    own = (file_sets.MANIFEST, pulled_folder.LIST)  # those of an imported or pulled folder list other files
    for file in folder.iterdir():
        if file.is_file() and file.name not in own:
            shutil.copy(file, target / file.name)
    return target


def _requirements() -> list[str]:
    """Return pinned requirements of the served model, at the versions that are installed here."""
    from importlib.metadata import version

    names = ("mlflow", "torch", "numpy", "safetensors", "pillow", "pandas")
    return [f"{name}=={version(name).split('+')[0]}" for name in names]


@contextmanager
def registry_errors(uri: str) -> Iterator[None]:
    """Raise EnvironmentFault where MLflow raises an error inside the `with` block."""
    try:
        yield
    except mlflow_errors() as error:
        remedy = "check that MLflow and its artifact store can be reached; check track.uri or MLFLOW_TRACKING_URI"
        if refuses_user(error):
            remedy = "log in as a user who may do this: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise EnvironmentFault(
            f"the model registry at {uri} cannot be used: {first_line(error, uri)}", remedy
        ) from error
