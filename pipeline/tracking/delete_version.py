"""Lists the versions of all registered models, and deletes versions together with their files.

A version is deleted before its files, so that no version names files that are missing. Before that, its logged model,
which owns the files, gets a mark. Where the deletion is interrupted, the mark tells the next one which files are left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CorruptError
from pipeline.tracking.mlflow_run import client
from pipeline.tracking.registry import MOST_VERSIONS, Version, registry_errors, version_of

_MARK = "sagan_deleted"
_FILES = re.compile(r".*/models/(m-[0-9a-f]{32})/artifacts/?", re.DOTALL)  # where MLflow puts a logged model's files
_PAGE = 1000
_MISSING = "RESOURCE_DOES_NOT_EXIST"


@dataclass(frozen=True)
class ListedVersion:
    """A version of a registered model, as the registry lists it.

    Attributes:
        name: Name of the registered model.
        version: Number, state and tags.
        aliases: Names of its aliases.
        source: Location of its files.
    """

    name: str
    version: Version
    aliases: tuple[str, ...]
    source: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version.number}"

    @property
    def model_id(self) -> str | None:
        """Id of the logged model that owns the files; None where the files are not those of a logged model."""
        match = _FILES.fullmatch(self.source)
        return match[1] if match else None


def all_versions(uri: str) -> list[ListedVersion]:
    """Return all versions of all models, sorted by name and number. Raises EnvironmentFault, CorruptError."""
    with registry_errors(uri):
        mlflow = client(uri)
        aliases: dict[tuple[str, int], list[str]] = {}
        for model in _pages(lambda token: mlflow.search_registered_models(max_results=_PAGE, page_token=token)):
            for alias, number in model.aliases.items():
                aliases.setdefault((model.name, int(number)), []).append(alias)
        entries = mlflow.search_model_versions(max_results=MOST_VERSIONS)
    listed = []
    for entry in entries:
        version = version_of(entry)
        names = tuple(sorted(aliases.get((entry.name, version.number), ())))
        listed.append(ListedVersion(entry.name, version, names, entry.source or ""))
    return sorted(listed, key=lambda one: (one.name, one.version.number))


def run_starts(uri: str) -> dict[str, tuple[str, str]]:
    """Return what the MLflow runs of the tracker say that they started from.

    The keys are the URLs of the sources: of a checkpoint, or of a registered version. Each value is the name of a run,
    and the SHA-256 that the run recorded of the source. Raises EnvironmentFault.
    """
    with registry_errors(uri):
        mlflow = client(uri)
        runs = _pages(
            lambda token: mlflow.search_runs(
                _experiments(mlflow), "tags.init LIKE '%'", max_results=_PAGE, page_token=token
            )
        )
        return {
            run.data.tags["init"]: (run.info.run_name or run.info.run_id, run.data.tags.get("init_sha256", ""))
            for run in runs
        }


def knows_run(uri: str, run_id: str) -> bool:
    """Return whether the tracker shows an MLflow run to this user. Raises EnvironmentFault."""
    from mlflow.exceptions import MlflowException

    with registry_errors(uri):
        try:
            client(uri).get_run(run_id)
        except MlflowException as error:
            if error.error_code not in (_MISSING, "PERMISSION_DENIED", "INVALID_PARAMETER_VALUE"):
                raise
            return False
        return True


def size_of_files(uri: str, model_id: str) -> int:
    """Return the size in bytes of the files of a logged model; 0 where it is deleted.

    Raises CorruptError where its files are not in a folder of their own, and EnvironmentFault.
    """
    with registry_errors(uri):
        repository = _repository(uri, model_id)
        return 0 if repository is None else _size(repository, None)


def delete_version(uri: str, listed: ListedVersion) -> None:
    """Delete a version, and then its files. The caller has checked that nothing names it.

    Raises CorruptError where its files are not in a folder of their own, and EnvironmentFault.
    """
    model_id = listed.model_id
    if model_id is None:
        raise CorruptError(f"{listed.uri} names files that are not those of a logged model: {listed.source}")
    with registry_errors(uri):
        if _repository(uri, model_id) is not None:
            client(uri).set_logged_model_tags(model_id, {_MARK: "true"})
        client(uri).delete_model_version(listed.name, str(listed.version.number))
    delete_files(uri, model_id)


def aliases_of(uri: str, listed: ListedVersion) -> tuple[str, ...] | None:
    """Return the aliases that a version has now; None where the version does not exist any more.

    Raises EnvironmentFault.
    """
    from mlflow.exceptions import MlflowException

    with registry_errors(uri):
        try:
            return tuple(client(uri).get_model_version(listed.name, str(listed.version.number)).aliases)
        except MlflowException as error:
            if error.error_code != _MISSING:
                raise
            return None


def interrupted_deletions(uri: str) -> list[str]:
    """Return the ids of the logged models whose version was deleted, while its files were not.

    Raises EnvironmentFault.
    """
    with registry_errors(uri):
        mlflow = client(uri)
        marked = list(
            _pages(
                lambda token: mlflow.search_logged_models(
                    _experiments(mlflow), f"tags.{_MARK} = 'true'", page_token=token
                )
            )
        )
    named = {listed.model_id for listed in all_versions(uri)}
    return sorted(model.model_id for model in marked if model.model_id not in named)


def delete_files(uri: str, model_id: str) -> None:
    """Delete the files of a logged model that no version names, and then the logged model.

    Raises CorruptError where its files are not in a folder of their own, and EnvironmentFault.
    """
    with registry_errors(uri):
        if (repository := _repository(uri, model_id)) is not None:
            repository.delete_artifacts(None)
            client(uri).delete_logged_model(model_id)


def _repository(uri: str, model_id: str) -> Any:
    """Return MLflow's access to the files of a logged model; None where it is deleted.

    Raises CorruptError where its location is not one that MLflow gives to logged models: the tracker is not trusted to
    name a folder that is deleted.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        location = client(uri).get_logged_model(model_id).artifact_location
    except MlflowException as error:
        if error.error_code != _MISSING:
            raise
        return None
    match = _FILES.fullmatch(location)
    if match is None or match[1] != model_id:
        raise CorruptError(f"the files of the logged model {model_id} are not in a folder of their own: {location}")
    return get_artifact_repository(location, tracking_uri=uri)


def _size(repository: Any, folder: str | None) -> int:
    entries = repository.list_artifacts(folder)
    return sum(_size(repository, entry.path) if entry.is_dir else entry.file_size or 0 for entry in entries)


def _experiments(mlflow: Any) -> list[str]:
    pages = _pages(lambda token: mlflow.search_experiments(max_results=_PAGE, page_token=token))
    return [experiment.experiment_id for experiment in pages]


def _pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yield the results of all pages of a search."""
    token = None
    while True:
        page = search(token)
        yield from page
        if not (token := page.token):
            return
