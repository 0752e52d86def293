"""Arguments that cannot be meant are refused before anything is computed, with what is wrong and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config.job_file import parse_job
from pipeline.errors import UsageError
from pipeline.job_runner import run_job


def refusal(*command: str) -> UsageError:
    """The error of a command line."""
    with pytest.raises(UsageError) as caught:
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert caught.value.remedy
    return caught.value


def test_what_is_neither_a_collection_nor_a_checkpoint_is_not_verified(tmp_path: Path) -> None:
    assert f"no packed collection and no checkpoint at {tmp_path}/typo" in refusal("verify", f"{tmp_path}/typo").message


@pytest.mark.parametrize("name", ["samples", "samples.foo", "samples.png/", "samples.jpg"])
def test_samples_are_written_to_png_files_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "samples.png").mkdir()
    assert str(tmp_path / "samples") in refusal("sample", "no-model", "--out", f"{tmp_path}/{name}").message


@pytest.mark.parametrize("command", [("sample", "no-model"), ("report", "no-run")])
def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path, command: tuple[str, str]) -> None:
    suffix = {"sample": "png", "report": "html"}[command[0]]
    (tmp_path / "file").write_text("mine")
    (tmp_path / f"folder.{suffix}").mkdir()
    for out in (f"file/out.{suffix}", f"file/below/out.{suffix}", f"folder.{suffix}", f"{'x' * 300}.{suffix}"):
        assert f"{tmp_path / out} cannot be written" in refusal(*command, "--out", str(tmp_path / out)).message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", [("sample", "no-model"), ("report", "no-run")])
def test_a_command_that_fails_changes_no_file(tmp_path: Path, command: tuple[str, str]) -> None:
    old, new = tmp_path / "old.png", tmp_path / "new.png"
    old.write_text("mine")
    for out in (old, new):
        assert command[1] in refusal(*command, "--out", str(out)).message
    assert old.read_text() == "mine"
    assert not new.exists()


@pytest.mark.parametrize("option", [("--n", "0"), ("--n", "-1"), ("--seed", "-1"), ("--seed", str(2**64))])
def test_numbers_of_samples_outside_their_range_are_refused(tmp_path: Path, option: tuple[str, str]) -> None:
    done = CliRunner().invoke(app, ["sample", "no-model", "--out", f"{tmp_path}/s.png", *option])
    assert done.exit_code == 2
    assert f"Invalid value for '{option[0]}'" in done.output


def test_no_images_are_not_the_default_number_of_images() -> None:
    said = refusal("evaluate", "no-model", "--reference", "no-collection", "--samples", "0")
    assert "evaluate.samples is 0" in said.message


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "pack", "destination": "no-folder", "pack": {"source": "no-images"}},
        {"kind": "evaluate", "model": "no-model", "reference": "no-collection"},
    ],
)
def test_a_job_without_a_run_cannot_start_over(tmp_path: Path, values: dict[str, str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(str({"name": "other", **values}))
    assert f"other is a job of kind: {values['kind']}" in refusal("run", str(path), "--fresh").message


def test_the_values_of_a_job_that_is_read_already_are_not_replaced() -> None:
    job = parse_job(
        {"kind": "pack", "name": "p", "destination": "no-folder", "pack": {"source": "no-images"}}, "the test"
    )
    with pytest.raises(UsageError, match=r"overrides .* pack\.seed"):
        run_job(job, {"pack.seed": 1})


@pytest.mark.parametrize(
    "command",
    [("pull", "models:/a'b@champion", "no-folder"), ("pull", 'models:/a"b/1', "no-folder"), ("promote", "a''b", "1")],
)
def test_a_name_with_quotes_is_the_name_of_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "has quotes" in refusal(*command).message
