"""Runs side by side: their order, how many run at once, and how they end after signals and failures."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable

import pytest

from pipeline.errors import EnvironmentFault, InterruptedRun
from pipeline.study.side_by_side import StopRequest, run_side_by_side

Run = Callable[[StopRequest], None]
LONG_S = 60.0


class Runs:
    """Runs that end when they are told to, and note when they begin and end."""

    def __init__(self, *names: str) -> None:
        self.begun, self.ended = list[str](), list[tuple[str, int]]()
        self.go = {name: threading.Event() for name in names}
        self.has_begun = {name: threading.Event() for name in names}

    def until_told(self, name: str) -> Run:
        def run(stop: StopRequest) -> None:
            self.begun.append(name)
            self.has_begun[name].set()
            while not self.go[name].wait(0.01):
                if stop():
                    raise InterruptedRun(f"{name} stopped")

        return run

    def note(self, name: str, running: int) -> None:
        self.ended.append((name, running))

    @property
    def all(self) -> dict[str, Run]:
        return {name: self.until_told(name) for name in self.go}


def test_as_many_run_as_may_start_and_in_their_order() -> None:
    runs, most = Runs("a", "b"), 0

    def may_start(running: int) -> bool:
        nonlocal most
        most = max(most, running)
        if running == 2:
            runs.go["b"].set()  # the third starts when one of the two has ended
        return running < 2

    def last(stop: StopRequest) -> None:
        runs.begun.append("c")
        runs.go["a"].set()

    run_side_by_side("the study", {**runs.all, "c": last}, may_start, runs.note)
    assert sorted(runs.begun[:2]) == ["a", "b"]
    assert runs.begun[2:] == ["c"]
    assert runs.ended[0] == ("b", 1)
    assert sorted(name for name, _ in runs.ended) == ["a", "b", "c"]
    assert most == 2


def test_one_signal_stops_all_and_no_other_starts() -> None:
    runs = Runs("a", "b", "c")

    def may_start(running: int) -> bool:
        if running == 2:
            assert runs.has_begun["a"].wait(LONG_S)
            assert runs.has_begun["b"].wait(LONG_S)
            os.kill(os.getpid(), signal.SIGINT)
        return running < 2

    with pytest.raises(InterruptedRun, match="the study s was stopped; its runs have kept their checkpoints"):
        run_side_by_side("the study s", runs.all, may_start, runs.note)
    assert sorted(runs.begun) == ["a", "b"]
    assert runs.ended == []


def test_a_signal_stops_the_runs_where_the_terminal_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler's message takes longer than the wait that it interrupts."""
    runs, waits = Runs("a"), threading.Event()

    class SlowTerminal(io.StringIO):
        def write(self, text: str) -> int:
            threading.Event().wait(1.0)
            return super().write(text)

    def interrupt() -> None:
        assert runs.has_begun["a"].wait(LONG_S)
        assert waits.wait(LONG_S)
        os.kill(os.getpid(), signal.SIGINT)
        if not asked.wait(LONG_S):
            runs.go["a"].set()  # the test then fails and does not hang

    def run(stop: StopRequest) -> None:
        try:
            runs.until_told("a")(stop)
        finally:
            asked.set()

    def may_start(running: int) -> bool:
        if running:
            waits.set()  # the next thing that the caller does is to wait
        return not running

    asked = threading.Event()
    monkeypatch.setattr(sys, "stdout", SlowTerminal())
    threading.Thread(target=interrupt).start()
    with pytest.raises(InterruptedRun):
        run_side_by_side("the study", {"a": run, "b": run}, may_start, runs.note)
    assert not runs.go["a"].is_set(), "the run was never asked to stop"


def test_a_second_signal_ends_runs_that_do_not_stop() -> None:
    interrupted = threading.Event()

    def run(stop: StopRequest) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            while not stop():
                threading.Event().wait(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            while stop():
                threading.Event().wait(0.01)
        except KeyboardInterrupt:
            interrupted.set()
            raise

    with pytest.raises(KeyboardInterrupt):
        run_side_by_side("the study", {"a": run}, lambda running: True, lambda name, running: None)
    assert interrupted.is_set()


def test_a_run_that_fails_ends_the_study_when_those_beside_it_have_ended(capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs("good", "late")

    def fail(stop: StopRequest) -> None:
        assert runs.has_begun["good"].wait(LONG_S)
        raise EnvironmentFault("storage is away")

    def may_start(running: int) -> bool:
        return running < 2

    def release() -> None:
        while "has failed" not in capsys.readouterr().out:
            threading.Event().wait(0.01)
        runs.go["good"].set()

    threading.Thread(target=release, daemon=True).start()
    all_runs = {"good": runs.until_told("good"), "bad": fail, "late": runs.until_told("late")}
    with pytest.raises(EnvironmentFault, match="storage is away"):
        run_side_by_side("the study", all_runs, may_start, runs.note)
    assert runs.begun == ["good"]
    assert runs.ended == [("good", 0)]


def test_a_signal_after_the_last_run_has_returned_interrupts_nothing() -> None:
    def run(stop: StopRequest) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    ended: list[str] = []
    run_side_by_side("the study", {"a": run}, lambda running: True, lambda name, running: ended.append(name))
    assert ended == ["a"]
