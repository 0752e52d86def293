"""MlflowRun and registry against a real MLflow server with its artifacts on a real S3 server."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from infra.local.server_process import BIN, CHECKOUT, Server, answers
from infra.local.servers import MlflowServer
from pipeline.cli import app
from pipeline.errors import CorruptError, EnvironmentFault, UsageError
from pipeline.image_grid import grid
from pipeline.runs.score_protocol import Score, ScoreProtocol
from pipeline.storage import file_sets, files
from pipeline.tracking import registry
from pipeline.tracking.champion import promote, promote_best
from pipeline.tracking.mlflow_run import MlflowRun, client
from pipeline.tracking.model_card import model_card
from sagan.config import ModelConfig, OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model
from tests.closed_port import closed_port, url_of
from tests.document_blocks import block

pytestmark = pytest.mark.system


TURNS = 6

SAMPLE = """
import sys
sys.path.insert(0, sys.argv[1] + "/code")
import sagan
from safetensors.torch import save_file

model = sagan.load(sys.argv[1])
images = model.sample(classes=["seven"], n=4, seed=3, truncation=0.7)
save_file({"images": images.contiguous()}, sys.argv[2])
assert sagan.__file__.startswith(sys.argv[1]), sagan.__file__
assert not {"mlflow", "ray", "pipeline", "fsspec", "torchvision"} & set(sys.modules)
"""

PREDICT = """
import mlflow, pandas as pd, sys
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
rows = pd.DataFrame({"class": ["seven", "0"], "seed": [3, 3], "truncation": [0.7, 1.0]})
assert model.predict(pd.DataFrame({"seed": [1, 2]}))["class"].tolist() == ["zero", "one"]
print(model.predict(rows).to_json(orient="records"))
import sagan
assert sagan.__file__.endswith("/code/sagan/__init__.py"), sagan.__file__
assert "pipeline" not in sys.modules
"""


# Registers and promotes a version for each line that it is told: name and score.
RIVAL = """
import sys, uuid
from pathlib import Path
from pipeline.tracking import registry
from pipeline.tracking.champion import promote, promote_best

uri, folder, run_id = sys.argv[1:]
print("ready", flush=True)
for line in sys.stdin:
    name, value = line.split()
    tags = {"metric": "fd_x/11111111", "fd_x/11111111": value, "better": "lower", "checkpoint_sha256": uuid.uuid4().hex}
    registry.register(uri, name, Path(folder), run_id, tags)
    promote_best(uri, name)
    print("done", flush=True)
"""


WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "golden retriever"]
REFUSED: list[tuple[list[dict[str, Any]], str]] = [
    ([{"class": 99}], "row 0: the model has no class 99"),
    ([{}, {"class": -1}], "no class -1"),
    ([{"class": "-1"}], "row 0: the model has no class '-1'"),
    ([{"class": "nine"}], "no class 'nine'"),
    ([{"class": 1.9}], "class is 1.9; it must be an integer"),
    ([{"class": True}], "class is True; it must be an integer"),
    ([{"class": ["seven"]}], "class is ['seven']"),
    ([{"seed": -1}], "seed is -1; it must be from 0 to 2**63 - 1"),
    ([{"seed": 2**70}], "it must be from 0 to 2**63 - 1"),
    ([{"seed": 0.5}], "seed is 0.5; it must be an integer"),
    ([{"seed": "3"}], "seed is '3'; it must be an integer"),
    ([{"truncation": 1e39}], "at most 10"),
    ([{"truncation": 0.0}], "truncation is 0.0"),
    ([{"truncation": float("inf")}], "at most 10"),
    ([], "rows"),
    (1025 * [{"seed": 1}], "the input has 1025 rows; send 1 to 1024 rows"),
]


class Serving(Server):
    """`mlflow models serve`, as it is told to be used: any environment that has the model's requirements."""

    name = "MLflow's model server"

    def __init__(self, model: Path) -> None:
        pickle = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
        super().__init__(env={"PYTHONSAFEPATH": "1", "PYTHONPATH": "", **pickle})
        self.model = model

    def command(self) -> list[str]:
        where = ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(self.port)]
        return [str(BIN / "mlflow"), "models", "serve", "--model-uri", str(self.model), *where]

    def ready(self) -> bool:
        return answers(f"http://127.0.0.1:{self.port}/ping")

    def refuse(self, rows: list[dict[str, Any]]) -> dict[str, str]:
        """Return the body of the answer 400."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.predict(rows)
        assert caught.value.code == 400
        refused: dict[str, str] = json.load(caught.value)
        return refused

    def predict(self, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/invocations",
            json.dumps({"dataframe_records": rows}).encode(),
            {"Content-Type": "application/json"},
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=60) as answer:
            predictions: list[dict[str, str]] = json.load(answer)["predictions"]
        return predictions


@pytest.fixture(scope="module")
def server(mlflow_server: MlflowServer) -> MlflowServer:
    return mlflow_server


@pytest.fixture
def run_id(server: MlflowServer) -> str:
    tracker = MlflowRun.start(server.uri, "registry", "run", None, {}, {}, None)
    tracker.close(timeout_s=10)
    return tracker.run_id


@pytest.fixture
def name() -> str:
    return f"model-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is ready to register."""
    networks = ModelConfig(resolution=32, num_classes=10, z_dim=16, channels_g=8, channels_d=8)
    words = WORDS
    model = Model.from_state(TrainState(networks, OptimConfig(), 0), standing_images=32, class_names=words)
    folder = tmp_path_factory.mktemp("model")
    model.save(folder)
    grid(model.sample(n=10), words, columns=5).save(folder / "samples.png")
    protocol = ScoreProtocol(
        extractor="x",
        extractor_digest="",
        resize="none",
        reference_digest="",
        split="train",
        samples=100,
        seed=0,
        weights=model.weights,
        batch_norm=model.batch_norm,
    )
    score = Score.of(protocol, "fd_x", False, {"fd_x": 12.5})
    (folder / "README.md").write_text(model_card("digits", model, score, {"kimg": "2"}))
    return folder


def tags(value: float, metric: str = "fd_x/11111111", better: str = "lower") -> dict[str, str]:
    return {
        "metric": metric,
        metric: repr(value),
        "better": better,
        "protocol": json.dumps({"extractor": metric}),
        "checkpoint_sha256": uuid.uuid4().hex,
        "checkpoint": f"s3://bucket/runs/x/checkpoints/{value}",
    }


def test_the_training_state_behind_a_version_is_pulled_and_is_the_one_that_was_registered(
    server: MlflowServer, s3: Any, run_id: str, name: str, folder: Path, tmp_path: Path
) -> None:
    state = TrainState(
        ModelConfig(resolution=32, num_classes=10, z_dim=16, channels_g=8, channels_d=8), OptimConfig(), 0
    )
    (tmp_path / "state").mkdir()
    state.save(tmp_path / "state")
    url = f"{s3.bucket()}/runs/x/checkpoints/1"
    manifest = file_sets.upload_set(tmp_path / "state", url)
    facts = tags(1.0) | {"checkpoint": url, "checkpoint_sha256": manifest.digest}
    version = registry.register(server.uri, name, folder, run_id, facts)
    pulled = registry.pull_checkpoint(server.uri, f"models:/{name}/{version}", tmp_path / "pulled")
    assert all(
        torch.equal(a, b) for (_, a), (_, b) in zip(state.tensors(), TrainState.load(pulled).tensors(), strict=True)
    )

    other = registry.register(server.uri, name, folder, run_id, facts | {"checkpoint_sha256": "ab" * 32})
    with pytest.raises(CorruptError, match="is not the checkpoint from which"):
        registry.pull_checkpoint(server.uri, f"models:/{name}/{other}", tmp_path / "other")
    registry.client(server.uri).delete_model_version_tag(name, str(other), "checkpoint_sha256")
    with pytest.raises(CorruptError, match="is not the checkpoint from which"):
        registry.pull_checkpoint(server.uri, f"models:/{name}/{other}", tmp_path / "without")
    (tmp_path / "state" / "state.safetensors").unlink()
    without = file_sets.upload_set(tmp_path / "state", f"{url}-without")
    facts |= {"checkpoint": f"{url}-without", "checkpoint_sha256": without.digest}
    stateless = registry.register(server.uri, name, folder, run_id, facts)
    with pytest.raises(CorruptError, match=r"has no state\.safetensors"):
        registry.pull_checkpoint(server.uri, f"models:/{name}/{stateless}", tmp_path / "stateless")
    file_sets.remove_set(url)
    with pytest.raises(CorruptError, match=f"version {version} does not exist: {url}"):
        registry.pull_checkpoint(server.uri, f"models:/{name}/{version}", tmp_path / "gone")


def test_a_registered_model_is_found_pulled_and_sampled_without_this_system(
    server: MlflowServer, run_id: str, name: str, folder: Path, tmp_path: Path
) -> None:
    facts = tags(12.5)
    version = registry.register(server.uri, name, folder, run_id, facts)
    assert promote_best(server.uri, name) == version
    assert registry.register(server.uri, name, folder, run_id, facts) == version
    assert registry.checkpoints(server.uri, name) == {facts["checkpoint"]}
    source = client(server.uri).get_model_version(name, str(version)).source
    assert files.exists(f"{source}/generator.safetensors")
    assert source.startswith("s3://")

    pulled = registry.pull(server.uri, f"models:/{name}@champion", tmp_path / "elsewhere" / "champion")
    assert {"generator.safetensors", "config.json", "code", "README.md", "samples.png"} <= {
        p.name for p in pulled.iterdir()
    }
    assert "fd_x = 12.5" in (pulled / "README.md").read_text()
    out = tmp_path / "images.safetensors"
    isolated("-c", SAMPLE, str(pulled), str(out), cwd=tmp_path)
    from safetensors.torch import load_file

    expected = Model.load(folder).sample(["seven"], 4, 3, 0.7)
    assert torch.equal(load_file(out)["images"], expected)
    assert registry.pull(server.uri, f"models:/{name}/{version}", pulled) == pulled


def pull(server: MlflowServer, *arguments: str) -> Any:
    """`sagan pull ARGUMENTS`."""
    return CliRunner(env={"MLFLOW_TRACKING_URI": server.uri}).invoke(app, ["pull", *arguments])


def test_a_pull_into_the_current_folder_and_a_second_pull_replace_only_what_a_pull_wrote(
    server: MlflowServer, run_id: str, name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = registry.register(server.uri, name, folder, run_id, tags(1.0))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert pull(server, f"models:/{name}/{version}", ".").exit_code == 0
    Model.load(tmp_path / "here")

    (tmp_path / "here" / "notes.txt").write_text("mine")
    (tmp_path / "here" / "code" / "mine.py").write_text("mine")
    shorter = tmp_path / "shorter"
    shutil.copytree(folder, shorter)
    (shorter / "samples.png").unlink()
    (shorter / "README.md").write_text("the second")
    second = registry.register(server.uri, name, shorter, run_id, tags(2.0))
    assert pull(server, f"models:/{name}/{second}", str(tmp_path / "here")).exit_code == 0
    assert (tmp_path / "here" / "notes.txt").read_text() == (tmp_path / "here" / "code" / "mine.py").read_text()
    assert (tmp_path / "here" / "README.md").read_text() == "the second"
    assert not (tmp_path / "here" / "samples.png").exists(), "a file of the first model alone"
    assert not [path for path in (tmp_path / "here").iterdir() if path.name.startswith(".pull-")]
    Model.load(tmp_path / "here")


def test_a_pull_is_refused_before_it_touches_files_of_others(
    server: MlflowServer, run_id: str, name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = registry.register(server.uri, name, folder, run_id, tags(1.0))
    for path, text in {"own/letter.txt": "mine", "copy/generator.safetensors": "a model that no pull wrote"}.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
        for options in ([], ["--checkpoint"]):
            monkeypatch.chdir((tmp_path / path).parent)
            result = pull(server, f"models:/{name}/{version}", ".", *options)
            assert isinstance(result.exception, UsageError)
            assert "is not empty" in str(result.exception)
        assert [p.name for p in (tmp_path / path).parent.iterdir()] == [(tmp_path / path).name]
        assert (tmp_path / path).read_text() == text
    (tmp_path / "file").write_text("mine")
    assert "is a file" in str(pull(server, f"models:/{name}/{version}", str(tmp_path / "file")).exception)

    pulled = registry.pull(server.uri, f"models:/{name}/{version}", tmp_path / "pulled")
    (pulled / "samples.png").unlink()
    shorter = tmp_path / "shorter"
    shutil.copytree(folder, shorter)
    (shorter / "samples.png").unlink()
    second = registry.register(server.uri, name, shorter, run_id, tags(2.0))
    registry.pull(server.uri, f"models:/{name}/{second}", pulled)
    (pulled / "samples.png").write_text("mine")
    before = {path: path.read_bytes() for path in pulled.rglob("*") if path.is_file()}
    result = pull(server, f"models:/{name}/{version}", str(pulled))
    assert "samples.png" in str(result.exception)
    assert {path: path.read_bytes() for path in pulled.rglob("*") if path.is_file()} == before


def test_a_damaged_version_or_none_leaves_the_folder_as_it_was(
    server: MlflowServer, run_id: str, name: str, folder: Path, tmp_path: Path
) -> None:
    version = registry.register(server.uri, name, folder, run_id, tags(1.0))
    pulled = registry.pull(server.uri, f"models:/{name}/{version}", tmp_path / "pulled")
    before = {path: path.read_bytes() for path in pulled.rglob("*") if path.is_file()}
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "generator.safetensors").write_bytes(b"not tensors")
    second = registry.register(server.uri, name, damaged, run_id, tags(2.0))
    with pytest.raises(CorruptError, match=f"{name} version {second}"):
        registry.pull(server.uri, f"models:/{name}/{second}", pulled)
    with pytest.raises(UsageError, match="not in the registry"):
        registry.pull(server.uri, f"models:/{name}/99", pulled)
    with pytest.raises(UsageError, match="not in the registry"):
        registry.pull(server.uri, f"models:/{name}/99", tmp_path / "new")
    assert {path: path.read_bytes() for path in pulled.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_the_card_of_a_pulled_model_shows_code_that_runs(folder: Path, tmp_path: Path) -> None:
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 10
    (tmp_path / "model").symlink_to(folder)
    isolated("-c", code, cwd=tmp_path / "model")
    with Image.open(folder / "sample-15.png") as sample:
        assert sample.size == (32, 32)


def test_mlflow_opens_it_without_pickle_and_without_this_repository(
    server: MlflowServer, run_id: str, name: str, folder: Path, tmp_path: Path
) -> None:
    registry.register(server.uri, name, folder, run_id, tags(1.0))
    promote_best(server.uri, name)
    environment = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    assert not list(registry.pull(server.uri, f"models:/{name}@champion", tmp_path / "pulled").rglob("*.pkl"))
    printed = isolated("-c", PREDICT, server.uri, f"models:/{name}@champion", cwd=tmp_path, **environment)
    rows = json.loads(printed.splitlines()[-1])
    assert [row["class"] for row in rows] == ["seven", "zero"]
    assert torch.equal(decoded(rows[0]), Model.load(folder).sample(["seven"], 1, 3, 0.7)[0])


def test_a_pulled_model_is_served_over_http(
    server: MlflowServer, run_id: str, name: str, folder: Path, tmp_path: Path
) -> None:
    registry.register(server.uri, name, folder, run_id, tags(1.0))
    promote_best(server.uri, name)
    pulled = registry.pull(server.uri, f"models:/{name}@champion", tmp_path / "pulled")
    asked: list[dict[str, Any]] = [{"class": "seven", "seed": 3, "truncation": 0.7}, {"class": 2, "seed": 5}, {}]
    with Serving(pulled) as serving:
        rows = serving.predict(asked)
        documented = block("pipeline/README.md", "served").replace("8000", str(serving.port))
        isolated("-c", documented, cwd=tmp_path, no_proxy="127.0.0.1")
        numbers = serving.predict([{"class": 4}, {"seed": 1}])  # a column of numbers with a gap
        assert len(serving.predict([{}, {}])) == 2
        many = serving.predict([{"seed": i} for i in range(150)])  # three forward passes
        for rows_, reason in REFUSED:
            refused = serving.refuse(rows_)
            assert refused["error_code"] == "INVALID_PARAMETER_VALUE", (rows_, refused)
            assert reason in refused["message"]
            assert not {"stack_trace", "Traceback"} & refused.keys()
            assert "Traceback" not in refused["message"]
            assert "/site-packages/" not in refused["message"]
    assert [row["class"] for row in many[:11]] == [*WORDS, "zero"]
    assert [row["class"] for row in rows] == ["seven", "two", "two"]
    assert [row["class"] for row in numbers] == ["four", "one"]
    model = Model.load(folder)
    written = [png(file.read_bytes()) for file in (tmp_path / "0.png", tmp_path / "1.png")]
    wanted = [model.sample([7], 1, 3, 0.8)[0], model.sample([3], 1, 1)[0]]
    assert all(same(image, other) for image, other in zip(written, wanted, strict=True))
    expected = [model.sample(["seven"], 1, 3, 0.7)[0], model.sample([2], 1, 5)[0], model.sample([2], 1, 2)[0]]
    assert all(same(decoded(row), image) for row, image in zip(rows, expected, strict=True))


def same(image: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two uint8 images differ in less than 1 % of their values, by one each.

    Kernels add in another order in a batch of another size, on some CPUs. A value at a half is then rounded otherwise.
    """
    difference = (image.int() - other.int()).abs()
    return difference.max().item() <= 1 and (difference > 0).float().mean().item() < 0.01


def decoded(row: dict[str, str]) -> torch.Tensor:
    """uint8 [3, H, W] of a row that `predict` gave."""
    return png(base64.b64decode(row["png"]))


def png(content: bytes) -> torch.Tensor:
    """uint8 [3, H, W] of a PNG file."""
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(content))).copy()).permute(2, 0, 1)


def test_champion_moves_to_better_ones_only_and_never_across_protocols(
    server: MlflowServer, run_id: str, name: str, folder: Path
) -> None:
    def add(value: float, **changes: str) -> int:
        registry.register(server.uri, name, folder, run_id, tags(value, **changes))
        champion = promote_best(server.uri, name)
        assert champion is not None
        return champion

    assert promote_best(server.uri, name) is None
    assert [add(5.0), add(6.0), add(4.0)] == [1, 1, 3]
    assert add(0.1, metric="fd_x/22222222") == 3
    registry.add_score(server.uri, name, 3, "fd_x/22222222", 0.2)  # once scored under the other protocol, it is beaten
    assert promote_best(server.uri, name) == 4


def test_each_key_ranks_in_its_own_direction(server: MlflowServer, run_id: str, name: str, folder: Path) -> None:
    """A distance champion is scored by recall too: there the higher one wins."""
    registry.register(server.uri, name, folder, run_id, tags(5.0))
    promote_best(server.uri, name)
    registry.add_score(server.uri, name, 1, "recall/33333333", 0.9)
    registry.register(server.uri, name, folder, run_id, tags(0.7, "recall/33333333", "higher"))
    assert promote_best(server.uri, name) == 1
    registry.register(server.uri, name, folder, run_id, tags(0.95, "recall/33333333", "higher"))
    assert promote_best(server.uri, name) == 3


def test_a_higher_score_wins_where_higher_is_better(server: MlflowServer, run_id: str, name: str, folder: Path) -> None:
    for value in (0.5, 0.9, 0.7):
        registry.register(server.uri, name, folder, run_id, tags(value, "recall/33333333", "higher"))
    assert promote_best(server.uri, name) == 2


def test_promotion_by_hand_needs_a_reason_and_lasts(server: MlflowServer, run_id: str, name: str, folder: Path) -> None:
    for value in (3.0, 2.0, 1.0):
        registry.register(server.uri, name, folder, run_id, tags(value))
    promote_best(server.uri, name)
    with pytest.raises(UsageError) as refused:
        promote(server.uri, name, 2)
    assert "fd_x/11111111 = 2.0" in refused.value.message
    assert "fd_x/11111111 = 1.0" in refused.value.message
    with pytest.raises(UsageError, match="no version 9"):
        promote(server.uri, name, 9)

    assert promote(server.uri, name, 2, "3 shows memorised images") == 2
    assert promote_best(server.uri, name) == 2
    withdrawn = {v.number: v.tags.get("withdrawn") for v in registry.versions(server.uri, name)}
    assert withdrawn == {1: None, 2: None, 3: "3 shows memorised images"}
    registry.register(server.uri, name, folder, run_id, tags(1.5))
    assert promote_best(server.uri, name) == 4
    assert promote(server.uri, name, 3) == 3
    assert promote_best(server.uri, name) == 3


def test_across_protocols_nothing_is_promoted_and_both_are_said(
    server: MlflowServer, run_id: str, name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    one, other = tags(5.0), tags(0.1, metric="fd_x/22222222")
    for facts in (one, other):
        registry.register(server.uri, name, folder, run_id, facts)
        promote_best(server.uri, name)
    with pytest.raises(UsageError, match="different protocols") as refused:
        sagan("promote", name, "2")
    assert all(facts["protocol"] in refused.value.message for facts in (one, other))
    assert "fd_x/11111111 = 5.0" in refused.value.message
    assert "fd_x/22222222 = 0.1" in refused.value.message
    assert refused.value.exit_code == 2
    champion = registry.champion_of(server.uri, name)
    assert champion is not None
    assert champion.number == 1


def test_the_commands_promote_forward_and_back_and_sample_the_champion(
    server: MlflowServer, run_id: str, name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    for value in (2.0, 1.0):
        registry.register(server.uri, name, folder, run_id, tags(value))
    promote_best(server.uri, name)
    with pytest.raises(UsageError, match="not better"):
        sagan("promote", name, "1")
    assert "version 1" in sagan("promote", name, "1", "--force", "2 shows memorised images")
    assert promote_best(server.uri, name) == 1
    champion = f"models:/{name}@champion"
    assert "sagan.load" in sagan("pull", champion, str(tmp_path / "pulled"))
    asked = ["--classes", "golden retriever", "--n", "16", "--truncation", "0.7", "--seed", "0"]
    sagan("sample", champion, "--out", str(tmp_path / "grid.png"), *asked)
    images = Model.load(tmp_path / "pulled").sample(["golden retriever"], 16, 0, 0.7)
    expected = grid(images, ["golden retriever"] * 16, columns=4)
    assert Image.open(tmp_path / "grid.png").tobytes() == expected.tobytes()
    assert "version 2" in sagan("promote", name, "2")
    assert promote_best(server.uri, name) == 2


def sagan(*arguments: str) -> str:
    """What a command prints. Raises as it does."""
    return CliRunner().invoke(app, arguments, catch_exceptions=False).output


def test_processes_that_register_and_promote_at_a_time_end_at_the_best(
    server: MlflowServer, run_id: str, name: str, folder: Path
) -> None:
    arguments = [sys.executable, "-c", RIVAL, server.uri, str(folder), run_id]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ExitStack() as stack:
        rivals = [stack.enter_context(subprocess.Popen(arguments, env=environment, **pipes)) for _ in range(2)]

        def heard() -> list[str]:
            return [rival.stdout.readline().strip() for rival in rivals if rival.stdout]

        assert heard() == ["ready", "ready"]
        for turn in range(TURNS):
            for i, rival in enumerate(rivals):
                assert rival.stdin
                rival.stdin.write(f"{name}-{turn} {(turn + i) % 2 + 1}\n")
                rival.stdin.flush()
            assert heard() == ["done", "done"]
        for rival in rivals:
            assert rival.stdin
            rival.stdin.close()
    for turn in range(TURNS):
        versions = registry.versions(server.uri, f"{name}-{turn}")
        assert [version.number for version in versions] == [1, 2]
        champion = registry.champion_of(server.uri, f"{name}-{turn}")
        assert champion is not None
        assert champion.tags["fd_x/11111111"] == "1"


def test_a_model_that_is_not_there_is_said_with_those_that_are(
    server: MlflowServer, run_id: str, name: str, folder: Path, tmp_path: Path
) -> None:
    for number in range(20):  # an error names so many models
        client(server.uri).create_registered_model(f"0-{name}-{number}")
    registry.register(server.uri, name, folder, run_id, tags(1.0))
    for uri in (f"models:/{name}@champion", f"models:/{name}/7"):
        with pytest.raises(UsageError, match=uri) as caught:
            registry.pull(server.uri, uri, tmp_path / "x")
        assert caught.value.remedy == f"choose one of the versions of {name}: 1"
    with pytest.raises(UsageError, match="not in the registry") as caught:
        registry.pull(server.uri, "models:/unheard-of@champion", tmp_path / "x")
    assert name in caught.value.remedy
    with pytest.raises(UsageError, match="is not a model URI"):
        registry.pull(server.uri, "models:/nonsense", tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not empty"):
        registry.pull(server.uri, f"models:/{name}/1", tmp_path / "full")


def test_what_an_outage_kept_back_arrives_when_the_server_is_back(server: MlflowServer, run_id: str) -> None:
    with closed_port() as way:
        tracker = MlflowRun(url_of(way), run_id)
        for step in (1, 2):
            tracker.log({"loss": float(step)}, step, step)
        with pytest.raises(EnvironmentFault, match="cannot be used"):
            promote_best(tracker.uri, "x")
        with way_opened(way, server.port):
            tracker.log({"loss": 3.0}, 3, 3)
            assert tracker.close(timeout_s=60) == 0
    history = client(server.uri).get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]


@contextmanager
def way_opened(way: socket.socket, server: int) -> Iterator[None]:
    """Forward connections to a closed port to the port of a server."""

    class Forward(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", server)) as there:
                threading.Thread(target=pump, args=(there, self.request), daemon=True).start()
                pump(self.request, there)

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    socketserver.ThreadingTCPServer.daemon_threads = True
    with socketserver.ThreadingTCPServer(way.getsockname(), Forward, bind_and_activate=False) as forwarder:
        forwarder.socket.close()
        forwarder.socket = way
        forwarder.server_activate()
        threading.Thread(target=forwarder.serve_forever, daemon=True).start()
        yield
        forwarder.shutdown()


def isolated(*arguments: str, cwd: Path, **environment: str) -> str:
    """What a fresh Python prints: no current folder, no user's packages, no PYTHONPATH, another working directory."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-I", *arguments], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
