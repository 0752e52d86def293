"""The folders of runs, sweeps and studies are found from each other, however the URL of one is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.runs.json_records import StudyRecord, SweepRecord, TrainSummary, Trial, TrialRecord
from pipeline.runs.stored_run import StoredStudy, StoredSweep, open_folder
from pipeline.storage import files

SPELLINGS: dict[str, Callable[[Path], str]] = {
    "absolute": str,
    "with a slash": lambda folder: f"{folder}/",
    "with slashes": lambda folder: f"{folder}//",
    "a file URL": lambda folder: f"file://{folder}/",
    "relative": lambda folder: f"./{folder.name}",
    "completed": lambda folder: f"{folder.name}/",
    "here": lambda _: "./",
}


@pytest.fixture
def spelt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Writes the URL of a folder in one of the ways of SPELLINGS, and goes where this URL names it."""

    def spell(url: str, spelling: str) -> str:
        folder = Path(url)
        monkeypatch.chdir(folder if spelling == "here" else folder.parent)
        return SPELLINGS[spelling](folder)

    return spell


def status(url: str) -> str:
    """What `sagan status` says."""
    done = CliRunner().invoke(app, ["status", url], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_study_finds_its_runs(tmp_path: Path, spelt: Callable[[str, str], str], spelling: str) -> None:
    study = StoredStudy(f"{tmp_path}/runs/studies/s")
    study.write_record(StudyRecord(name="s", mlflow_run_id="0", runs=["s-a-0", "s-a-1"]))
    for name in ("s-a-0", "s-a-1"):
        summary = TrainSummary(
            name=name,
            images=1000,
            seconds=1.0,
            images_per_s=None,
            mlflow_run_id="0",
            resumed_from=None,
            restarts=0,
            images_lost=0,
        )
        study.run(name).write_summary(summary)
    url = spelt(study.url, spelling)
    opened = open_folder(url)
    assert isinstance(opened, StoredStudy)
    assert files.local_path(opened.run("s-a-0").url) == tmp_path / "runs" / "s-a-0"
    assert "runs 2 of 2 have ended" in status(url)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_sweep_finds_its_trials(tmp_path: Path, spelt: Callable[[str, str], str], spelling: str) -> None:
    sweep = StoredSweep(f"{tmp_path}/runs/s")
    sweep.write_record(SweepRecord(name="s", mlflow_run_id="0", method={}))
    trial = Trial(name="s-a", point={"seed": 1}, score=None, kimg=1, outcome="finished")
    sweep.write_trial_record(TrialRecord(number=0, ended=True, trial=trial))
    opened = open_folder(spelt(sweep.url, spelling))
    assert isinstance(opened, StoredSweep)
    assert files.local_path(opened.trial("s-a").url) == tmp_path / "runs" / "s-a"
    assert "s-a finished, 1.0 kimg" in status(spelt(sweep.url, spelling))
