"""Odd characters in every name, path, key and variable: what is given comes back, or is refused clearly."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from pipeline.collection.manifest import Collection
from pipeline.collection.verify import verify_collection
from pipeline.config.job_file import load_job, parse_job
from pipeline.config.locations import sqlite_uri
from pipeline.config.schema import PackSection, TrainJob
from pipeline.errors import UsageError
from pipeline.packing.pack import pack
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import files
from pipeline.storage.validate_json import printable
from pipeline.streaming.read_images import read_images
from pipeline.tracking.mlflow_run import MlflowRun, client, default_uri
from pipeline.tracking.open_model import open_model
from sagan.config import OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model
from tests.unit.evaluation.conftest import NETWORKS, commit_checkpoint
from tests.unit.packing.coloured_images import picture, tar, write

pytestmark = pytest.mark.system

ODD = {f"a{odd}b" for odd in [*"[]*?#%+&'\"$@!{} é\n:;=,~^`|<>()\\", "%20", "%2F", "${X}", "..", "#?"]}
ODD |= {"[a]*", "{a,b}", " a", "a ", "#a", "?a", "-a", "a:b=c"}
JOINED = {f"a{''.join(sorted(ODD)[first::6])}b" for first in range(6)}  # for what takes seconds
JOINED |= {"%20", "a?b=c", " #"}
PHOTOS = {f"{name}/{n}.png": picture(n, ord(name)) for name in "ab" for n in range(3)}


# --- round trips -----------------------------------------------------------------------------------------------------


def collection(root: str, photos: Path, odd: str) -> None:
    """Pack to a folder of this name and read all images back. Delete it, and nothing beside it."""
    files.write_bytes(f"{root}/ab/beside", b"")
    packed = pack(f"{root}/{odd}", PackSection(source=str(photos), resolution=32))
    verify_collection(packed.url)
    read_all(packed.url, tempfile.mkdtemp(dir=photos.parent))
    files.delete(packed.url)
    assert files.list_files(f"{root}/{odd}") == []
    assert files.exists(f"{root}/ab/beside")


def source(root: str, odd: str, folder: Path) -> None:
    for name, data in PHOTOS.items():
        files.write_bytes(f"{root}/{odd}/{name}", data)
    packed = pack(tempfile.mkdtemp(dir=folder) + "/set", PackSection(source=f"{root}/{odd}", resolution=32))
    assert (packed.size("train"), packed.class_names) == (6, ["a", "b"])


def tar_file(folder: Path, odd: str) -> None:
    write(folder, {f"{odd}.tar": tar(PHOTOS)})
    packed = pack(tempfile.mkdtemp(dir=folder) + "/set", PackSection(source=f"{folder}/{odd}.tar", resolution=32))
    assert packed.size("train") == 6


def class_folder(folder: Path, odd: str) -> None:
    root = write(Path(tempfile.mkdtemp(dir=folder)), {f"{odd}/1.png": picture(1), "zz/2.png": picture(2)})
    packed = pack(f"{root}.set", PackSection(source=str(root), resolution=32))
    assert packed.class_names == sorted([printable(odd), "zz"])
    assert Collection.open(packed.url).class_names == packed.class_names


def image(folder: Path, odd: str) -> None:
    root = write(Path(tempfile.mkdtemp(dir=folder)), {f"{odd}.png": picture(1), "zz.png": picture(2)})
    packed = pack(f"{root}.set", PackSection(source=str(root), resolution=32))
    assert sorted(packed.names_at_source()) == sorted([f"{printable(odd)}.png", "zz.png"])


def read_all(url: str, cache: str) -> None:
    packed = Collection.open(url)
    images = np.concatenate([part.numpy() for part in read_images(packed, np.arange(6), cache, 1, 1)])
    assert {tuple(pixels[:, 9, 9].tolist()) for pixels in images} == {(n, ord(c), 0) for c in "ab" for n in range(3)}


def training_job(root: str, **sections: Any) -> TrainJob:
    values: dict[str, Any] = {"kind": "train", "name": "r", "data": {"train": "set"}, "model": NETWORKS.to_dict()}
    values |= {"train": {"kimg": 1, "batch": 32}, "checkpoint": {"root": root}, **sections}
    job = parse_job(values, "test")
    assert isinstance(job, TrainJob)
    return job


def checkpoints(root: str, odd: str) -> None:
    job = training_job(f"{root}/{odd}")
    assert job.checkpoint.root == f"{root}/{odd}"
    files.write_bytes(f"{root}/ab/beside", b"")
    stored, run = commit_checkpoint(job, 1000), StoredRun.of(job)
    assert [checkpoint.name for checkpoint in run.checkpoints()] == [stored.name]
    open_model(stored.url, section=job.evaluate.model_copy(update={"standing_images": None}))
    run.delete()
    assert run.checkpoints() == []
    assert files.exists(f"{root}/ab/beside")


def tracked(uri: str, experiment: str, artifacts: str | None, folder: Path) -> None:
    """Start a run, log a point and a file, read both back, and resume the run."""
    tracker = MlflowRun.start(uri, experiment, "r", None, {"p": "1"}, {"t": "x"}, artifacts)
    tracker.log({"a": 1.0}, 1, 1)
    tracker.log_file(write(folder, {"file.txt": "text"}) / "file.txt", "below")
    assert tracker.close(timeout_s=60) == 0
    mlflow = client(uri)
    run = mlflow.get_run(tracker.run_id)
    assert run.data.metrics["a"] == 1
    assert mlflow.get_experiment_by_name(experiment).experiment_id == run.info.experiment_id
    local = mlflow.download_artifacts(tracker.run_id, "below/file.txt", dst_path=tempfile.mkdtemp(dir=folder))
    assert Path(local).read_text() == "text"
    again = MlflowRun.start(uri, experiment, "r", tracker.run_id, {}, {}, artifacts)
    again.close(timeout_s=60)
    assert again.run_id == tracker.run_id


def tracked_below(folder: Path, odd: str) -> None:
    """A database in a folder of this name, which is the current folder of the command."""
    (folder / odd).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / odd)
        patch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
        uri = default_uri()
    assert uri == sqlite_uri(folder / odd / "mlflow.db")
    tracked(uri, "e", f"{folder}/{odd}/artifacts", folder)
    assert (folder / odd / "mlflow.db").is_file()


def model_folder(folder: Path, odd: str) -> None:
    model = Model.from_state(TrainState(NETWORKS, OptimConfig(), seed=0), standing_images=8)
    model.save(folder / odd)
    assert open_model(f"{folder}/{odd}").config == model.config


def variable(folder: Path, odd: str, key: str) -> None:
    (folder / "job.yaml").write_text(f"kind: train\n{key}\ntrain: {{kimg: 1, batch: 16}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOMETHING", odd)
        job: Any = load_job(folder / "job.yaml")
    assert odd in (job.data.train.removeprefix("s3://b/"), job.track.experiment, job.name)


def split(photos: Path, odd: str) -> None:
    section = {"source": {odd: str(photos)}, "resolution": 32}
    destination = tempfile.mkdtemp(dir=photos.parent) + "/set"
    job: Any = parse_job({"kind": "pack", "name": "p", "destination": destination, "pack": section}, "test")
    assert pack(destination, job.pack).size(odd) == 6


@pytest.fixture
def places(tmp_path: Path, s3: Any) -> dict[str, Callable[[str], object]]:
    photos, bucket = write(tmp_path / "photos", PHOTOS), s3.bucket()
    packed = pack(f"{tmp_path}/packed", PackSection(source=str(photos), resolution=32))
    return {
        "folder of a collection": partial(collection, f"{tmp_path}/out", photos),
        "key of a collection": partial(collection, f"{bucket}/out", photos),
        "folder of a source": lambda odd: source(f"{tmp_path}/in", odd, tmp_path),
        "key of a source": lambda odd: source(f"{bucket}/in", odd, tmp_path),
        "name of a tar": partial(tar_file, tmp_path),
        "class folder": partial(class_folder, tmp_path),
        "image": partial(image, tmp_path),
        "split": partial(split, photos),
        "cache": lambda odd: read_all(packed.url, f"{tmp_path}/{odd}"),
        "folder of checkpoints": partial(checkpoints, f"{tmp_path}/runs"),
        "key of checkpoints": partial(checkpoints, f"{bucket}/runs"),
        "experiment": lambda odd: tracked(f"sqlite:///{tmp_path}/e.db", odd, f"{tmp_path}/artifacts", tmp_path),
        "folder of artifacts": lambda odd: tracked(
            f"sqlite:///{tmp_path}/a.db", uuid4().hex, f"{tmp_path}/{odd}", tmp_path
        ),
        "key of artifacts": lambda odd: tracked(f"sqlite:///{tmp_path}/k.db", uuid4().hex, f"{bucket}/{odd}", tmp_path),
        "current folder": partial(tracked_below, tmp_path),
        "folder of a model": partial(model_folder, tmp_path),
        "variable of a path": lambda odd: variable(tmp_path, odd, "name: t\ndata: {train: 's3://b/${SOMETHING}'}"),
        "variable of a text": lambda odd: variable(
            tmp_path, odd, "name: t\ndata: {train: set}\ntrack: {experiment: '${SOMETHING}'}"
        ),
        "variable of a name": lambda odd: variable(tmp_path, odd, "name: ${SOMETHING}\ndata: {train: set}"),
        "name of a run": lambda odd: training_job("runs", name=odd),
    }


REFUSED = {  # place → what is refused there; everything else comes back
    "split": ODD - {"a..b"},
    "variable of a name": ODD - {"a..b"},
    "name of a run": ODD - {"a..b"},
}
SECONDS_EACH = {"key of a collection", "key of a source", "folder of checkpoints", "key of checkpoints", "experiment"}
SECONDS_EACH |= {"current folder", "folder of artifacts", "key of artifacts", "folder of a model"}
PLACES = [
    "folder of a collection",
    "key of a collection",
    "folder of a source",
    "key of a source",
    "name of a tar",
    "class folder",
    "image",
    "split",
    "cache",
    "folder of checkpoints",
    "key of checkpoints",
    "experiment",
    "folder of artifacts",
    "key of artifacts",
    "current folder",
    "folder of a model",
    "variable of a path",
    "variable of a text",
    "variable of a name",
    "name of a run",
]


@pytest.mark.parametrize("place", PLACES)
def test_what_is_given_comes_back_or_is_refused(place: str, places: dict[str, Callable[[str], object]]) -> None:
    refused, failed = set(), {}
    names = JOINED if place in SECONDS_EACH else ODD
    for odd in sorted(names):
        try:
            places[place](odd)
        except UsageError:
            refused.add(odd)
        except Exception as error:
            failed[odd] = repr(error)
    assert failed == {}
    assert refused == names & REFUSED.get(place, set())
