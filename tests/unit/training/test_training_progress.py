"""What people see of runs on one screen: lines that name their run, and a bar for each run that trains."""

from __future__ import annotations

import pytest

from pipeline.config.schema import TrainJob
from pipeline.training.status.messages import Logged, Noted
from pipeline.training.status.run_status import Status
from pipeline.training.status.training_progress import Console, Screen

SHARES = {"data_wait_share": 0.0, "checkpoint_share": 0.0, "evaluation_share": 0.0}


def job(name: str) -> TrainJob:
    return TrainJob.model_validate({"name": name, "data": {"train": "/i"}, "train": {"kimg": 8, "batch": 16}})


def status(images: int, speed: float, line: str) -> Status:
    now = Status()
    now.apply(Logged(images, {"loss_d": 1.5, "loss_g": -0.5, "images_per_s": speed, **SHARES}, 1.0))
    now.apply(Noted(line))
    return now


def test_lines_of_runs_side_by_side_begin_with_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(several=True) as screen, Console(job("a"), screen) as first, Console(job("b"), screen) as second:
        first.show(status(1000, 31, "checkpoint 0"))
        second.show(status(2000, 32, "[bold]"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["a: starting 1 worker …", "b: starting 1 worker …", "a: checkpoint 0"]
    assert lines[3].startswith("a: 1.0/8 kimg  D 1.500")
    assert lines[4] == "b: [bold]"


def test_a_run_alone_has_no_name_before_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen() as screen, Console(job("a"), screen) as console:
        console.show(status(1000, 31, "checkpoint 0"))
    assert capsys.readouterr().out.splitlines()[:2] == ["starting 1 worker …", "checkpoint 0"]


def test_a_terminal_has_a_bar_for_each_run_that_trains(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with Screen(several=True) as screen:
        with Console(job("ended"), screen) as ended:
            ended.show(status(8000, 33, "[bold]"))
        with Console(job("first"), screen) as first, Console(job("second"), screen) as second:
            first.show(status(1000, 31, "checkpoint 0"))
            second.show(status(2000, 32, "checkpoint 1"))
            capsys.readouterr()
            screen.progress.refresh()
            shown = capsys.readouterr().out
    assert "first" in shown
    assert "2.0/8 kimg" in shown
    assert "32 img/s" in shown
    assert "ended" not in shown
