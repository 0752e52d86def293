"""Finds and reads what a new run starts from: a checkpoint, a registered model, or a folder with a model (`init`).

The source is read once, when the run starts. Its state becomes the run's first checkpoint, from which all workers
start. Later starts compare the record of the run with the job and read the source no more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline.config.schema import InitSection, TrainJob
from pipeline.errors import CorruptError, UsageError, shown_url
from pipeline.runs.checkpoints import CHECKPOINT_FACTS, StoredCheckpoint, load_state
from pipeline.runs.json_records import RecordedInit
from pipeline.runs.stored_run import StoredRun, StoredSweep, open_folder
from pipeline.storage import file_sets, files
from pipeline.storage.validate_json import printable
from pipeline.tracking import registry
from pipeline.tracking.mlflow_run import tracking_uri
from pipeline.tracking.open_model import class_names_of
from sagan import trained_model
from sagan.train_state import FACTS, TENSORS, Facts, TrainState
from sagan.trained_model import Model
from sagan.warm_start import Choice, Source, WarmStart, tensors_of

_MODELS = "models:/"
_STATE_FILES = (TENSORS, FACTS, CHECKPOINT_FACTS)
_MODEL_FILES = (trained_model.TENSORS, trained_model.FACTS)


@dataclass(frozen=True)
class _Found:
    """A source that was found.

    Attributes:
        version: as in `RecordedInit`.
        sha256: digest of its tensors, its configuration and its class names.
        source: what it is.
        read: reads its tensors.
        train_seconds: seconds of training up to its position.
    """

    version: str | None
    sha256: str
    source: Source
    read: Callable[[], dict[str, Tensor]]
    train_seconds: float = 0.0


def find_init(job: TrainJob, class_names: Sequence[str], known: RecordedInit | None) -> RecordedInit | None:
    """Return what a job starts from; None where it has no `init`. The tensors of a checkpoint are not read.

    A run keeps the start that it recorded as long as the job names the same source, also where the alias names another
    version or the run there has gone on. The source is not read then.

    Args:
        job: The job, with the resolution and the number of classes of its collection.
        class_names: Class names of the collection.
        known: Record of the run or the sweep of this name; None where there is none.

    Raises UsageError where there is no source or where it does not fit the job. Raises CorruptError, EnvironmentFault.
    """
    if job.init is None:
        return None
    source = shown_url(job.init.source)
    if known is not None and known.source == source:
        return known
    found = _find(job, job.init, None)
    start = _plan(job, class_names, found)
    return RecordedInit(
        source=source,
        version=found.version,
        sha256=found.sha256,
        taken=list(map(printable, start.taken)),
        skipped=list(map(printable, start.skipped)),
    )


def first_state(job: TrainJob, class_names: Sequence[str], init: RecordedInit) -> tuple[TrainState, float]:
    """Read the source. Return the state that the run starts from, and the seconds of training up to its position.

    Raises UsageError where the source has changed since `find_init`. Raises CorruptError, EnvironmentFault.
    """
    assert job.init is not None
    found = _find(job, job.init, init.version)
    if found.sha256 != init.sha256:
        raise UsageError(
            f"{location(job.init.source, init.version)} has changed since {job.name} began to start from it",
            "give the new run another name (name=…), or start over with --fresh",
        )
    state = _plan(job, class_names, found).state(found.read(), job.seed)
    return state, found.train_seconds if state.images else 0.0


def pin_source(job: TrainJob, init: RecordedInit | None) -> TrainJob:
    """Return a job whose source is the version that was found, so that all trials of a sweep start from it."""
    if job.init is None or init is None:
        return job
    source = location(job.init.source, init.version)
    return job.model_copy(update={"init": job.init.model_copy(update={"source": source})})


def location(source: str, version: str | None) -> str:
    """Return the URL of a version of a source: of a checkpoint in the folder of a run, or of a registered version."""
    if version is None:
        return source
    if source.startswith(_MODELS):
        name = source.removeprefix(_MODELS).partition("@")[0].partition("/")[0]
        return f"{_MODELS}{name}/{version}"
    return StoredRun(source).checkpoint(version).url


def checkpoint_digest(manifest: file_sets.Manifest, url: str) -> str:
    """Return the digest that a run records if it starts from the checkpoint with this manifest. Raises CorruptError."""
    return _digest(manifest, _STATE_FILES, url)


def describe(init: RecordedInit) -> dict[str, str]:
    """Return the facts about a start that MLflow and the model card have, by name."""
    return {
        "init": location(init.source, init.version),
        "init_sha256": init.sha256,
        "init_taken": "; ".join(init.taken),
        "init_skipped": "; ".join(init.skipped),
    }


def _plan(job: TrainJob, class_names: Sequence[str], found: _Found) -> WarmStart:
    """Decide what the job takes. Raises UsageError where the source does not fit."""
    assert job.init is not None
    choice = Choice(job.init.networks, job.init.optimizers, job.init.ema, job.init.keep_position)
    try:
        start = WarmStart.plan(found.source, job.model, job.optim, class_names, choice)
        if start.images >= 1000 * job.train.kimg:
            raise ValueError(f"it is at {start.images / 1000:g} kimg, and the run would end at {job.train.kimg:g} kimg")
        return start
    except ValueError as error:
        raise UsageError(
            f"{job.name} cannot start from {location(job.init.source, found.version)}: {error}",
            "set the keys of model to the values of the source, take other parts of it (init.networks, "
            "init.optimizers, init.ema, init.keep_position), or give another init.source",
        ) from None


def _find(job: TrainJob, init: InitSection, version: str | None) -> _Found:
    """Find a source. With `version`, find this version of it."""
    where = init.source
    if where.startswith(_MODELS):
        return _registered(tracking_uri(job), init, version)
    if files.exists(files.join(where, FACTS)):
        return _state(where, None)
    folder = open_folder(where)
    if isinstance(folder, StoredRun):
        newest = [folder.checkpoint(version)] if version else folder.checkpoints()[-1:]
        if not newest:
            raise UsageError(f"the run {where} has no complete checkpoint", "wait for its first one, or give another")
        return _state(newest[0].url, newest[0].name)
    if isinstance(folder, StoredSweep):
        raise UsageError(f"{where} is a sweep", "give the folder of one of its trials, or models:/NAME@champion")
    if files.is_local(where) and (files.local_path(where) / trained_model.FACTS).exists():
        folder_of_model = files.local_path(where)
        file_sets.check_local_set(folder_of_model)
        return _model(folder_of_model, where, None)
    raise UsageError(
        f"there is nothing to start from at {where}",
        "give the folder of a run, the URL of a checkpoint, models:/NAME@ALIAS, or a folder that `sagan pull` wrote",
    )


def _registered(uri: str, init: InitSection, version: str | None) -> _Found:
    """Find the checkpoint of a registered version, or its generator where the job takes nothing else."""
    model_uri = location(init.source, version) if version else registry.numbered(uri, init.source)
    number = model_uri.rpartition("/")[2]
    if init.networks != "generator":
        remedy = "set init.networks=generator to start from the registered generator alone"
        return _state(registry.checkpoint_of(uri, model_uri, remedy), number)
    with files.temporary_folder("init") as temp:
        return _model(registry.pull(uri, model_uri, temp / "model"), model_uri, number)


def _state(url: str, version: str | None) -> _Found:
    """Find a checkpoint. A folder that `sagan pull --checkpoint` wrote has its files and no manifest."""

    def read() -> dict[str, Tensor]:
        with _fetched(url, _STATE_FILES) as (folder, _):
            return tensors_of(load_state(folder, url))

    with _fetched(url, (FACTS, CHECKPOINT_FACTS)) as (folder, manifest):
        try:
            facts = Facts.load(folder)
        except (FileNotFoundError, ValueError) as error:
            reason = str(error).replace(f"{folder}/", "")
            raise CorruptError(f"{url} is not a checkpoint of this version: {reason}", "give another source") from error
        names = class_names_of(folder, url, facts.model)
        train_seconds = StoredCheckpoint(str(folder)).facts().train_seconds
    source = Source(facts.model, names, images=facts.images)
    return _Found(version, _digest(manifest, _STATE_FILES, url), source, read, train_seconds)


def _model(folder: Path, url: str, version: str | None) -> _Found:
    """Read the finished generator in a local folder. `url` is named in messages."""
    try:
        model = Model.load(folder)
    except (FileNotFoundError, ValueError) as error:
        reason = str(error).replace(f"{folder}/", "")
        raise CorruptError(f"{url} holds no model of this version: {reason}", "give another source") from error
    manifest = file_sets.Manifest({name: file_sets.FileEntry.of(folder / name) for name in _MODEL_FILES})
    source = Source(model.config, model.class_names, finished=True)
    return _Found(version, manifest.digest, source, lambda: tensors_of(model))


@contextmanager
def _fetched(url: str, names: Collection[str]) -> Iterator[tuple[Path, file_sets.Manifest]]:
    """Yield a local folder with verified files of the checkpoint at `url`, and entries of all its files."""
    if files.is_local(url) and file_sets.read_manifest(url) is None:
        folder = files.local_path(url)
        paths = [folder / name for name in _STATE_FILES if (folder / name).is_file()]
        yield folder, file_sets.Manifest({path.name: file_sets.FileEntry.of(path) for path in paths})
        return
    with files.temporary_folder("init") as temp:
        try:
            manifest = file_sets.fetch_set(url, temp, names)
        except FileNotFoundError as error:
            raise CorruptError(f"there is no complete checkpoint at {url}: {error}", "give another source") from error
        yield temp, manifest


def _digest(manifest: file_sets.Manifest, names: Collection[str], url: str) -> str:
    """Return the digest of files of a set. It is the same wherever the set is. Raises CorruptError."""
    if missing := sorted(set(names) - manifest.files.keys()):
        raise CorruptError(f"{url} has no {missing[0]}", "give another source")
    return file_sets.Manifest({name: manifest.files[name] for name in names}).digest
