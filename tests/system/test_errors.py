"""What a user is told when something is wrong: what, where, what to do; the right exit code; no traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from pipeline import cli

JOB = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
pytestmark = [pytest.mark.system]


@pytest.fixture
def sagan(s3, tmp_path, monkeypatch, capfd):
    """Run a command line against the real S3 server, in this process; (exit code, what was printed)."""
    monkeypatch.setenv("SAGAN_BUCKET", s3.bucket())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["sagan", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = " ".join("".join(capfd.readouterr()).split())
        assert "Traceback" not in printed, printed
        return code, printed

    yield run
    ray.shutdown()


def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def photos(tmp_path):
    """Two classes of two images."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
                tmp_path / "photos" / label / f"{i}.png"
            )
    return tmp_path / "photos"


def test_misspelt_key_and_wrong_type(sagan):
    code, printed = sagan("run", JOB, "train.btach=3", "evaluate.kimg=often")
    assert code == 2
    assert "train.btach is not a key; did you mean train.batch?" in printed
    assert "evaluate.kimg is 'often'" in printed


def test_more_workers_than_the_batch(sagan):
    code, printed = sagan("run", JOB, "train.workers=64")
    assert code == 2
    assert "train.workers is 64, but train.batch has only 32 images" in printed


def test_bucket_that_does_not_exist(sagan):
    code, printed = sagan("run", JOB, SAGAN_BUCKET="s3://nowhere-at-all")
    assert code == 3
    assert "nowhere-at-all" in printed
    assert "bucket" in printed


def test_wrong_secret(sagan):
    code, printed = sagan("run", JOB, AWS_SECRET_ACCESS_KEY="wrong")
    assert code == 3
    assert "AWS_SECRET_ACCESS_KEY" in printed


def test_storage_that_is_down(sagan):
    code, printed = sagan("run", JOB, AWS_ENDPOINT_URL=f"http://127.0.0.1:{unused_port()}")
    assert code == 3
    assert "127.0.0.1" in printed


def test_tracker_that_is_down(sagan):
    code, printed = sagan("run", JOB, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{unused_port()}")
    assert code == 3
    assert "MLflow at http://127.0.0.1" in printed


def test_folder_without_images(sagan, tmp_path):
    (tmp_path / "empty").mkdir()
    code, printed = sagan("pack", tmp_path / "empty", tmp_path / "out")
    assert code == 2
    assert "empty" in printed
    assert "no image" in printed


def test_text_named_jpg(sagan, photos, tmp_path):
    (photos / "cat" / "notes.jpg").write_text("not a picture")
    code, printed = sagan("pack", photos, tmp_path / "out", "--resolution", 32)
    assert code != 0
    assert "notes.jpg" in printed
    assert "max" in printed, "it says how to tolerate it"
    assert not (tmp_path / "out" / "manifest.json").exists()
    code, printed = sagan("pack", photos, tmp_path / "out", "--resolution", 32, "--max-broken", 1)
    assert code == 0, printed
    assert "notes.jpg" in printed


def test_classes_asked_of_a_collection_without(sagan, photos, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for i, path in enumerate(photos.rglob("*.png")):
        path.rename(plain / f"{i}.png")
    assert sagan("pack", plain, tmp_path / "out", "--resolution", 32)[0] == 0
    code, printed = sagan("run", JOB, f"data.train={tmp_path / 'out'}", "data.pack=", "model.num_classes=10")
    assert code == 2
    assert "model.num_classes is 10, but the collection has 0" in printed


def test_inception_without_weights_fails_before_training(sagan, photos, tmp_path):
    assert sagan("pack", photos, tmp_path / "out", "--resolution", 32)[0] == 0
    overrides = [f"data.train={tmp_path / 'out'}", "data.pack=", "evaluate.extractor=inception"]
    code, printed = sagan("run", JOB, *overrides, HOME=str(tmp_path))
    assert code == 3
    assert "weights-inception-2015-12-05-6726825d.pth" in printed
    assert "evaluate.extractor_weights" in printed
    assert "starting" not in printed


def test_no_such_model(sagan, tmp_path):
    code, printed = sagan("sample", "models:/nobody@champion", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert code == 2, printed
    assert "nobody" in printed


@pytest.mark.xdist_group("ray")  # it starts a Ray of its own: not beside others
def test_too_few_devices(sagan):
    code, printed = sagan("run", JOB, "resources.device=cuda")
    assert code == 3
    assert "2 workers need 2 GPUs; the cluster has 0" in printed


def test_an_ascii_terminal_ends_no_command(tmp_path):
    command = [sys.executable, "-m", "pipeline", "config", str(tmp_path / "été.yaml")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(JOB.parents[1])}
    missing = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert missing.returncode == 2
    assert "\\xe9t\\xe9.yaml cannot be read" in missing.stderr
    assert "Traceback" not in missing.stderr
    (tmp_path / "été.yaml").write_text("kind: pack\nname: p\ndestination: s3://b/été\npack: {source: digits}\n")
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "destination: s3://b/\\xe9t\\xe9" in shown.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user that the system does not know")
def test_a_user_without_a_home_is_told():
    script = "import os, sys; from pipeline import cli; os.setuid(54321); sys.argv = ['sagan', 'config']; cli.main()"
    environment = {k: v for k, v in os.environ.items() if k != "HOME"} | {"PYTHONPATH": str(JOB.parents[1])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 3, done.stderr
    assert "export HOME=" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_that_does_not_answer_ends_the_command_soon(sagan):
    """Ray itself waits for minutes for a head that is gone."""
    address = f"127.0.0.1:{unused_port()}"
    code, printed = sagan("run", JOB, RAY_ADDRESS=address)
    assert code == 3
    assert f"the Ray cluster at {address} cannot be reached" in printed
