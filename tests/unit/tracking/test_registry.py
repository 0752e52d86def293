"""Changed files of registered models, in a registry on the local disk."""

from __future__ import annotations

import os
import resource
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import CorruptError
from pipeline.storage import files
from pipeline.tracking import registry
from pipeline.tracking.champion import promote_best
from pipeline.tracking.mlflow_run import MlflowRun, client
from sagan.config import ModelConfig, OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model
from tests.tracker_database import tracker_database

NETWORKS = ModelConfig(resolution=32, num_classes=10, z_dim=16, channels_g=4, channels_d=4)


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = tracker_database(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def artifact(uri: str, tmp_path: Path) -> Path:
    """Registers version 1 of `digits`, and returns the folder of its files in the artifact store."""
    folder = tmp_path / "model"
    Model.from_state(TrainState(NETWORKS, OptimConfig(), 0), standing_images=32).save(folder)
    Image.new("RGB", (32, 32)).save(folder / "samples.png")
    tracker = MlflowRun.start(uri, "digits", "digits", None, {}, {}, str(tmp_path / "artifacts"))
    tracker.close(timeout_s=10)
    tags = {"metric": "fd/1", "fd/1": "1.0", "better": "lower", "checkpoint_sha256": uuid.uuid4().hex}
    assert registry.register(uri, "digits", folder, tracker.run_id, tags) == 1
    promote_best(uri, "digits")
    return files.local_path(client(uri).get_model_version("digits", "1").source)


def add_a_line(folder: Path) -> str:
    with (folder / "code/sagan/__init__.py").open("a") as file:
        file.write("print(1)\n")
    return "code/sagan/__init__.py"


def change_a_weight(folder: Path) -> str:
    data = bytearray((folder / "generator.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "generator.safetensors").write_bytes(data)
    return "generator.safetensors"


def add_a_module(folder: Path) -> str:
    (folder / "code/torch.py").write_text("print(1)\n")
    return "code/torch.py"


def remove_the_card(folder: Path) -> str:
    (folder / "samples.png").unlink()
    return "samples.png"


def write_a_new_manifest(folder: Path) -> str:
    add_a_line(folder)
    from pipeline.storage.file_sets import MANIFEST, Manifest

    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_bytes(Manifest.of(folder).to_bytes())
    return "manifest.json"


CHANGES = [add_a_line, change_a_weight, add_a_module, remove_the_card, write_a_new_manifest]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_version_is_refused_by_its_file(
    change: Callable[[Path], str], artifact: Path, tmp_path: Path
) -> None:
    def pull() -> None:
        CliRunner().invoke(app, ["pull", "models:/digits@champion", str(tmp_path / "out")], catch_exceptions=False)

    pull()
    changed = change(artifact)
    for command in (
        ["pull", "models:/digits@champion", str(tmp_path / "out")],
        ["sample", "models:/digits/1", "--out", str(tmp_path / "samples.png")],
        ["report", "models:/digits/1", "--out", str(tmp_path / "report.html")],
    ):
        with pytest.raises(CorruptError, match=changed):
            CliRunner().invoke(app, command, catch_exceptions=False)
    assert (tmp_path / "out" / "samples.png").exists()  # the model that was pulled before is kept
    assert not (tmp_path / "samples.png").exists()


def test_a_version_whose_files_have_grown_is_refused_before_they_are_downloaded(
    artifact: Path, uri: str, tmp_path: Path
) -> None:
    os.truncate(artifact / "generator.safetensors", 2**40)  # sparse: it takes no room in the artifact store
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, limits[1]))  # so that a download cannot fill the disk
    try:
        with pytest.raises(CorruptError, match=r"generator\.safetensors"):
            registry.pull(uri, "models:/digits/1", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_version_whose_number_is_none_is_refused(artifact: Path, uri: str, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("UPDATE model_versions SET version = '../x\x1b[2J'")
    with pytest.raises(CorruptError, match=r"'\.\./x\\x1b\[2J'"):
        registry.pull(uri, "models:/digits@champion", tmp_path / "out")


@pytest.mark.parametrize("value", ["", "x", "nan"])
def test_a_version_whose_score_is_no_number_is_not_compared(
    artifact: Path, uri: str, tmp_path: Path, value: str
) -> None:
    client(uri).delete_registered_model_alias("digits", "champion")
    client(uri).set_model_version_tag("digits", "1", "fd/1", value)
    tags = {"metric": "fd/1", "fd/1": "2.0", "better": "lower", "checkpoint_sha256": uuid.uuid4().hex}
    run_id = client(uri).get_model_version("digits", "1").run_id
    assert registry.register(uri, "digits", tmp_path / "model", run_id, tags) == 2
    assert promote_best(uri, "digits") == 2


def test_a_version_without_a_digest_is_refused_with_what_to_do(artifact: Path, uri: str, tmp_path: Path) -> None:
    client(uri).delete_model_version_tag("digits", "1", "files_sha256")
    with pytest.raises(CorruptError, match="no tag files_sha256") as refused:
        registry.pull(uri, "models:/digits/1", tmp_path / "out")
    assert "--checkpoint" in refused.value.remedy


def test_a_pulled_folder_whose_weights_changed_is_refused(artifact: Path, uri: str, tmp_path: Path) -> None:
    pulled = registry.pull(uri, "models:/digits/1", tmp_path / "out")
    sample = ["sample", str(pulled), "--out", str(tmp_path / "samples.png")]
    (pulled / "code/sagan/__pycache__").mkdir()
    (pulled / "code/sagan/__pycache__/x.pyc").touch()  # Python writes such files
    CliRunner().invoke(app, sample, catch_exceptions=False)
    change_a_weight(pulled)
    with pytest.raises(CorruptError, match=r"generator\.safetensors"):
        CliRunner().invoke(app, sample, catch_exceptions=False)
