"""A run that starts from something else takes it once, records it, and resumes without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipeline import cli
from pipeline.collection.manifest import Collection
from pipeline.config.job_file import parse_job, to_yaml
from pipeline.config.schema import TrainJob
from pipeline.errors import ConfigError, CorruptError, LastingFault, SaganError, UsageError
from pipeline.runs.checkpoints import StoredCheckpoint, load_state, upload_checkpoint, write_checkpoint
from pipeline.runs.json_records import CheckpointFacts
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import file_sets, files
from pipeline.tracking import registry
from pipeline.tracking.init_source import find_init, pin_source
from pipeline.tracking.mlflow_run import client
from pipeline.training.restart_budget import next_start
from pipeline.training.shared_types import Assignment, TrainingRun
from pipeline.training.status import messages
from pipeline.training.worker import training_loop
from sagan import Model, TrainState
from tests.faults.kills import FileSender
from tests.tracker_database import tracker_database
from tests.unit.sagan.training import CONFIG, run, same
from tests.unit.training.test_lost_mlflow_run import start_run

NAMES = ["ant", "bee", "cow"]  # of the collection `packed`
SOURCE = "source"


class Place:
    """A folder of runs and a tracker."""

    def __init__(self, folder: Path, collection: Collection) -> None:
        self.folder, self.collection = folder, collection
        self.uri = tracker_database(folder)
        self.runs = 0

    def values(self, init: dict[str, Any] | None, name: str | None = None, **model: Any) -> dict[str, Any]:
        self.runs += 1
        return {
            "kind": "train",
            "name": name or f"run-{self.runs}",
            "seed": 5,
            "data": {"train": self.collection.url, "cache": str(self.folder / "cache")},
            "model": {**CONFIG.to_dict(), **model},
            "train": {"kimg": 1, "batch": 8},
            "checkpoint": {"root": str(self.folder / "runs")},
            "evaluate": {"extractor": "classifier", "samples": 20},
            "track": {"uri": self.uri},
            "init": init,
        }

    def job(self, init: dict[str, Any] | None, name: str | None = None, **model: Any) -> TrainJob:
        job = parse_job(self.values(init, name, **model), "test")
        assert isinstance(job, TrainJob)
        return job

    @property
    def source(self) -> StoredRun:
        return StoredRun(str(self.folder / "runs" / SOURCE))


def trained(steps: int = 1) -> TrainState:
    state = TrainState(CONFIG, parse_optim(), seed=1)
    run(state, steps)
    return state


def parse_optim() -> Any:
    job = parse_job({"kind": "train", "name": "x", "data": {"train": "x"}, "train": {"kimg": 1}}, "test")
    assert isinstance(job, TrainJob)
    return job.optim


def commit(stored: StoredRun, state: TrainState, folder: Path, names: Sequence[str] = NAMES) -> StoredCheckpoint:
    """Write a checkpoint into a run, as training does."""
    local = folder / f"local-{state.images}-{len(list(folder.glob('local-*')))}"
    local.mkdir()
    facts = CheckpointFacts(
        images=state.images,
        train_seconds=1.0,
        to_score=False,
        collection_digest="cd" * 32,
        class_names=list(names),
        method_digest="ab" * 32,
        git_commit="unknown",
    )
    checkpoint = stored.checkpoint(write_checkpoint(local, state, b"", facts))
    upload_checkpoint(local, checkpoint)
    return checkpoint


@pytest.fixture(scope="module")
def place(packed: Collection, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run `source` of the same classes with a checkpoint after one step, and one after two steps."""
    made = Place(tmp_path_factory.mktemp("init"), packed)
    start_run(made.job(None, SOURCE))
    commit(made.source, trained(1), made.folder)
    commit(made.source, trained(2), made.folder)
    return made


@pytest.fixture
def copied_source(place: Place, tmp_path: Path) -> StoredRun:
    """A copy of the run `source`, which a test may change."""
    return StoredRun(str(shutil.copytree(place.source.url, tmp_path / "theirs")))


def first_checkpoint(job: TrainJob) -> tuple[StoredCheckpoint, TrainState]:
    (checkpoint,) = StoredRun.of(job).checkpoints()
    assert checkpoint.images == 0
    return checkpoint, load_state(files.local_path(checkpoint.url), checkpoint.url)


def networks(state: TrainState) -> dict[str, torch.Tensor]:
    return {
        name: tensor for name, tensor in state.tensors() if name.startswith(("generator.", "discriminator.", "ema"))
    }


def equal(ours: TrainState, theirs: TrainState) -> bool:
    return all(torch.equal(tensor, networks(theirs)[name]) for name, tensor in networks(ours).items())


# --- the sources -----------------------------------------------------------------------------------------------------


def test_a_run_starts_from_the_newest_checkpoint_of_another_run(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    job = place.job({"source": place.source.url, "optimizers": True})
    found = start_run(job)
    _, state = first_checkpoint(job)
    assert same(state, trained(2))
    assert (state.images, state.seed, found.reached) == (0, 5, 0)
    newest = place.source.checkpoints()[-1]
    lines = capsys.readouterr().out
    assert f"{job.name} starts from {newest.url}" in lines
    assert "  taken: moments of Adam: generator and discriminator" in lines
    assert "  not taken: position, seed" in lines
    record = StoredRun.of(job).record()
    assert record is not None
    assert record.init is not None
    assert (record.init.source, record.init.version) == (place.source.url, newest.name)
    assert record.method["init.sha256"] == record.init.sha256
    assert record.method["init.optimizers"] is True
    mlflow = client(place.uri).get_run(record.mlflow_run_id).data
    assert mlflow.params["init.sha256"] == record.init.sha256
    assert mlflow.tags["init"] == newest.url
    assert "moving average" in mlflow.tags["init_taken"]
    assert "position" in mlflow.tags["init_skipped"]


def test_a_run_goes_on_at_the_position_of_its_source(place: Place, tmp_path: Path) -> None:
    source = place.source.checkpoints()[-1]
    job = place.job({"source": source.url, "optimizers": True, "keep_position": True})
    start_run(job)
    (checkpoint,) = StoredRun.of(job).checkpoints()
    state = load_state(files.local_path(checkpoint.url), checkpoint.url)
    assert same(state, trained(2))
    assert (state.images, checkpoint.images) == (source.images, source.images)
    assert state.images > 0
    assert checkpoint.facts().train_seconds == source.facts().train_seconds > 0
    record = StoredRun.of(job).record()
    assert record is not None
    assert record.method["init.keep_position"] is True
    _, printed, _ = dry_run(place.values({"source": source.url, "keep_position": True}), tmp_path)
    assert any("goes on at the position of init.source" in note for note in json.loads(printed)["notes"])

    short = place.job({"source": source.url, "keep_position": True})
    ended = short.model_copy(update={"train": short.train.model_copy(update={"kimg": source.images / 1000})})
    with pytest.raises(UsageError, match=r"it is at \S+ kimg, and the run would end at"):
        start_run(ended)


def test_a_checkpoint_and_its_copy_elsewhere_are_the_same_start(place: Place, tmp_path: Path) -> None:
    older = place.source.checkpoints()[0]
    pulled = tmp_path / "pulled"
    file_sets.fetch_set(older.url, pulled)  # as `sagan pull --checkpoint` does, without the manifest
    digests = set()
    for source in (older.url, str(pulled)):
        job = place.job({"source": source})
        digests.add(start_run(job).record.method["init.sha256"])
        assert equal(first_checkpoint(job)[1], trained(1))
    assert len(digests) == 1


def test_a_folder_with_a_model_gives_its_generator(place: Place, tmp_path: Path) -> None:
    Model.from_state(trained(2), standing_images=32, class_names=NAMES).save(tmp_path / "model")
    job = place.job({"source": str(tmp_path / "model")})
    record = start_run(job).record
    assert record.init is not None
    assert "discriminator: the source has none; its weights are new" in record.init.skipped
    _, state = first_checkpoint(job)
    assert torch.equal(state.generator.norm.running_mean, Model.load(tmp_path / "model").generator.norm.running_mean)
    fresh = TrainState(CONFIG, job.optim, seed=5)
    assert torch.equal(state.discriminator.linear.weight, fresh.discriminator.linear.weight)


def registered(place: Place, name: str, state: TrainState, folder: Path, checkpoint: StoredCheckpoint) -> None:
    """Register a version and make it champion."""
    Model.from_state(state, standing_images=32, class_names=NAMES).save(folder)
    Image.new("RGB", (32, 32)).save(folder / "samples.png")
    manifest, record = file_sets.read_manifest(checkpoint.url), place.source.record()
    assert manifest is not None
    assert record is not None
    tags = {"metric": "fd/1", "fd/1": "1.0", "better": "lower"}
    tags |= {"checkpoint": checkpoint.url, "checkpoint_sha256": manifest.digest}
    number = registry.register(place.uri, name, folder, record.mlflow_run_id, tags)
    client(place.uri).set_registered_model_alias(name, "champion", str(number))


def test_a_champion_gives_its_checkpoint_or_its_generator_and_stays_the_start_when_the_alias_moves(
    place: Place, copied_source: StoredRun, tmp_path: Path
) -> None:
    first, second = copied_source.checkpoints()
    registered(place, "theirs", trained(1), tmp_path / "one", first)
    whole, generator = (
        place.job({"source": "models:/theirs@champion", "networks": networks}) for networks in ("all", "generator")
    )
    for job in (whole, generator):
        record = start_run(job).record
        assert record.init is not None
        assert record.init.version == "1"
    assert equal(first_checkpoint(whole)[1], trained(1))
    model = Model.load(tmp_path / "one")
    assert torch.equal(first_checkpoint(generator)[1].generator.conv.weight, model.generator.conv.weight)

    registered(place, "theirs", trained(2), tmp_path / "two", second)
    before = StoredRun.of(whole).record()
    start_run(whole)
    assert StoredRun.of(whole).record() == before
    later = place.job({"source": "models:/theirs@champion"})
    start_run(later)
    assert equal(first_checkpoint(later)[1], trained(2))

    shutil.rmtree(copied_source.url)
    with pytest.raises(CorruptError, match="the checkpoint of theirs version 2 does not exist") as caught:
        start_run(place.job({"source": "models:/theirs@champion"}))
    assert "init.networks=generator" in caught.value.remedy


def test_other_classes_take_the_rows_of_their_names(place: Place, tmp_path: Path) -> None:
    checkpoint = commit(StoredRun(str(tmp_path / "x")), trained(1), tmp_path, names=["cow", "yak", "ant"])
    job = place.job({"source": checkpoint.url})
    record = start_run(job).record
    assert record.init is not None
    assert any(
        "the row of the same name for ant, cow, and the mean of the 3 rows for bee" in x for x in record.init.taken
    )
    assert "classes that only the source has: yak" in record.init.skipped
    table = first_checkpoint(job)[1].ema["blocks.0.norm1.weight"]
    assert torch.equal(table[0], trained(1).ema["blocks.0.norm1.weight"][2])


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_run_with_a_checkpoint_resumes_without_its_source(place: Place, copied_source: StoredRun) -> None:
    job = place.job({"source": copied_source.url})
    digest = start_run(job).method_digest
    before = first_checkpoint(job)[0]
    shutil.rmtree(copied_source.url)
    assert start_run(job).method_digest == digest
    assert StoredRun.of(job).checkpoints() == [before]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_from_what_it_recorded(
    place: Place, copied_source: StoredRun, tmp_path: Path
) -> None:
    job = place.job({"source": copied_source.url})
    digest = start_run(job).method_digest
    first = first_checkpoint(job)[0]
    file_sets.remove_set(first.url)
    commit(copied_source, trained(3), tmp_path)
    assert start_run(job).method_digest == digest
    assert first_checkpoint(job)[0] == first, "its name holds the digest of the state"

    file_sets.remove_set(first.url)
    recorded = copied_source.checkpoints()[1]
    shutil.rmtree(recorded.url)
    shutil.copytree(copied_source.checkpoints()[0].url, recorded.url)
    with pytest.raises(UsageError, match=f"{recorded.name} has changed since {job.name} began"):
        start_run(job)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"networks": "generator"}, "init.networks: 'all' in that run, 'generator' in this job"),
        ({"optimizers": True}, "init.optimizers: False in that run, True in this job"),
        ({"ema": False}, "init.ema: None in that run, False in this job"),
        (None, "in that run, absent in this job"),
    ],
)
def test_another_start_is_another_method(place: Place, change: dict[str, Any] | None, line: str) -> None:
    init = {"source": place.source.url}
    job = place.job(init)
    start_run(job)
    with pytest.raises(UsageError, match=f"a run named {job.name} exists") as caught:
        start_run(place.job(None if change is None else init | change, job.name))
    assert line in caught.value.message


def test_another_source_is_another_method_and_the_same_content_elsewhere_is_not(
    place: Place, copied_source: StoredRun
) -> None:
    job = place.job({"source": place.source.url})
    start_run(job)
    start_run(place.job({"source": copied_source.url}, job.name))
    with pytest.raises(UsageError, match=r"init\.sha256: '[0-9a-f]{64}' in that run"):
        start_run(place.job({"source": place.source.checkpoints()[0].url}, job.name))


def test_all_trials_of_a_sweep_start_from_the_same_checkpoint(
    place: Place, copied_source: StoredRun, tmp_path: Path
) -> None:
    base = place.job({"source": copied_source.url})
    init = find_init(base, NAMES, None)
    pinned = pin_source(base, init)
    commit(copied_source, trained(3), tmp_path)
    assert find_init(base, NAMES, init) == init, "a later driver of the sweep keeps what the first one found"
    start_run(pinned)
    assert equal(first_checkpoint(pinned)[1], trained(2))


# --- what is refused -------------------------------------------------------------------------------------------------


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "state.safetensors")
        change(tensors)
        save_file(tensors, folder / "state.safetensors")

    return changed


def change_facts(folder: Path) -> None:
    facts = json.loads((folder / "state.json").read_text())
    facts["model"]["num_classes"] = 90_000
    (folder / "state.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: (folder / "state.safetensors").write_bytes(b"\xff" * 100), "is damaged"),
        (change_tensors(lambda t: t.pop("ema.conv.weight")), "'ema.conv.weight' is not as"),
        (change_tensors(lambda t: t.update({"ema.conv.weight": torch.zeros(1)})), "'ema.conv.weight' is not as"),
        (change_tensors(lambda t: t["generator.conv.weight"].fill_(torch.nan)), "generator.conv.weight is not finite"),
        (change_facts, "3 names for 90000 classes"),
        (lambda folder: (folder / "state.json").write_text("[]"), "is not a checkpoint of this version"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "checkpoint.json is missing"),
        (lambda folder: (folder / "state.safetensors").unlink(), "has no state.safetensors"),
    ],
)
def test_a_damaged_state_of_somebody_else_starts_no_run(
    change: Callable[[Path], object], problem: str, place: Place, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    file_sets.fetch_set(place.source.checkpoints()[0].url, theirs)
    change(theirs)
    job = place.job({"source": str(theirs)})
    with pytest.raises(CorruptError, match=problem):
        start_run(job)
    assert StoredRun.of(job).record() is None


def test_a_checkpoint_that_differs_from_its_manifest_starts_no_run(place: Place, copied_source: StoredRun) -> None:
    newest = files.local_path(copied_source.checkpoints()[-1].url)
    (newest / "state.safetensors").write_bytes((newest / "state.safetensors").read_bytes()[:-1] + b"\0")
    with pytest.raises(CorruptError, match=r"state\.safetensors differs from its manifest"):
        start_run(place.job({"source": copied_source.url}))


def test_a_changed_file_of_a_pulled_model_starts_no_run(place: Place, tmp_path: Path) -> None:
    Model.from_state(trained(1), standing_images=32).save(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").write_bytes(file_sets.Manifest.of(tmp_path / "model").to_bytes())
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"config\.json is not the file"):
        start_run(place.job({"source": str(tmp_path / "model")}))


@pytest.mark.parametrize(
    ("name", "problem"),
    [("empty", "there is nothing to start from"), ("sweep", "is a sweep"), ("new", "has no complete checkpoint")],
)
def test_what_is_no_source_is_named(name: str, problem: str, place: Place, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    if name == "sweep":
        (folder / "run.json").write_text('{"kind": "tune"}')
    if name == "new":
        (folder / "run.json").write_text('{"kind": "train"}')
    with pytest.raises(UsageError, match=problem) as caught:
        start_run(place.job({"source": str(folder)}))
    assert caught.value.remedy


def test_the_runs_own_folder_is_no_source(place: Place) -> None:
    own = place.folder / "runs" / "mine" / "checkpoints"
    with pytest.raises(ConfigError, match="belongs to this run"):
        place.job({"source": str(own)}, "mine")


def work(run: TrainingRun, sender: FileSender) -> list[Any]:
    """Run the only worker of a run in this process. Returns its messages."""
    assert run.owner is not None
    assignment = Assignment(
        job=run.job.model_dump(mode="json", by_alias=True),
        tracking_uri=run.tracking_uri,
        mlflow_run_id=run.mlflow_run_id,
        driver=sender,  # type: ignore[arg-type]
        owner=run.owner.number,
        method_digest=run.method_digest,
        secrets={},
        score_in_line=None,
        step_timeout_s=60,
    )
    with (
        mock.patch.object(training_loop, "worker_device", return_value=torch.device("cpu")),
        mock.patch.object(training_loop, "configure_device"),  # its settings would stay in the process of the tests
    ):
        training_loop.train_worker(assignment, "")
    return list(sender.received())


def test_workers_without_the_first_checkpoint_do_not_start_from_new_weights(place: Place, tmp_path: Path) -> None:
    """Its file is damaged after the driver has written it."""
    found = start_run(place.job({"source": place.source.url}))
    checkpoint = files.local_path(first_checkpoint(found.job)[0].url)
    (checkpoint / "state.safetensors").write_bytes(b"")
    told = work(found, FileSender(tmp_path / "mailbox"))
    (failed,) = [message for message in told if isinstance(message, messages.Failed)]
    assert "has no good checkpoint" in failed.error.message
    assert "--fresh" in failed.error.remedy


class Refusing(FileSender):
    """A driver that has a group pause, and then refuses its start."""

    def ask(self, message: Any, timeout_s: float = 0.0) -> Any:
        fault = LastingFault("the keys have expired", "renew them")
        failed = [messages.WorkerFailed(fault, 0, "LastingFault")]
        return next_start([failed, failed, []], max_failures=1)


def test_workers_whose_start_is_refused_end_with_the_reason_and_raise_nothing(place: Place, tmp_path: Path) -> None:
    """Ray Train starts workers again without limit where one of them raises."""
    told = work(start_run(place.job({"source": place.source.url})), Refusing(tmp_path / "mailbox"))
    (failed,) = [message for message in told if isinstance(message, messages.Failed)]
    assert isinstance(failed.error, LastingFault)
    assert "the workers failed 2 times without a newer checkpoint" in failed.error.message
    assert not [message for message in told if isinstance(message, messages.WorkerFailed)]


# --- the dry run -----------------------------------------------------------------------------------------------------


def dry_run(values: dict[str, Any], folder: Path) -> tuple[int, str, SaganError | None]:
    job = parse_job(values, "test")
    (folder / "job.yaml").write_text(to_yaml(job))
    done = CliRunner().invoke(cli.app, ["run", str(folder / "job.yaml"), "--dry-run", "--json"])
    return done.exit_code, done.stdout, done.exception if isinstance(done.exception, SaganError) else None


def test_the_dry_run_says_where_a_run_starts(place: Place, tmp_path: Path) -> None:
    values = place.values({"source": place.source.url})
    code, printed, _ = dry_run(values, tmp_path)
    assert code == 0
    init = json.loads(printed)["init"]
    assert init["from"] == place.source.checkpoints()[-1].url
    assert "moving average" in init["taken"]
    assert "moments of Adam: new" in init["not_taken"]
    assert not files.exists(str(place.folder / "runs" / values["name"]))


def test_the_dry_run_refuses_what_does_not_fit(place: Place, tmp_path: Path) -> None:
    _, printed, error = dry_run(place.values({"source": place.source.url}, channels_g=8), tmp_path)
    assert isinstance(error, UsageError)
    assert "model.channels_g times model.multipliers_g: [16, 16, 16, 16] in the source, [32, 32, 32, 32]" in str(error)
    assert not printed


def test_the_dry_run_of_a_job_without_init_says_nothing_of_it(place: Place, tmp_path: Path) -> None:
    code, printed, _ = dry_run(place.values(None), tmp_path)
    assert code == 0
    assert "init" not in json.loads(printed)
