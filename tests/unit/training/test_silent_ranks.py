"""A rank that gives no sign is named, also where it cannot speak for itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.training.status import slow_ranks
from pipeline.training.status.messages import Alive, StartAsked
from pipeline.training.status.run_status import Status
from pipeline.training.worker.own_time import OwnTime
from pipeline.training.worker.watchdog import Watchdog
from sagan import World


def sum_for_ever(rank: int, store: Path, driver: Connection, pause_s: float) -> None:
    """A rank that steps until it is killed: each step waits for the other rank. Rank 1 works for `pause_s`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    watchdog, own_time, step = Watchdog(rank, 1.0, driver.send), OwnTime(), 0
    world = replace(World.current(), waits=lambda: own_time)
    while True:
        own_time.begin_step()
        time.sleep(rank * pause_s)
        world.sum_(torch.ones(1))
        own_time.end_step()
        watchdog.step(step := step + 1, own_time.seconds)


@contextmanager
def two_ranks(folder: Path, pause_s: float = 0.0) -> Iterator[tuple[list[int], list[Connection]]]:
    """(process ids, what the driver hears of each)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.training.worker.watchdog"])  # the ranks need not each import torch
    with ExitStack() as ended:
        processes, heard = [], []
        for rank in range(2):
            driver, worker = context.Pipe(duplex=False)
            process = context.Process(target=sum_for_ever, args=(rank, folder / "store", worker, pause_s), daemon=True)
            process.start()
            ended.callback(process.join)
            ended.callback(process.kill)
            processes.append(process.pid or 0)
            heard.append(driver)
        yield processes, heard


def test_a_stopped_rank_is_named_while_the_other_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_ranks, "SILENT_S", 3.0)
    status = Status()
    with two_ranks(tmp_path) as (processes, heard):

        def hear(ranks: list[int]) -> None:
            for rank in ranks:
                status.apply(heard[rank].recv())
            status.notice_silence("2 workers")

        hear([0, 1])
        os.kill(processes[1], signal.SIGSTOP)
        while not status.waits:
            hear([0])
        wait = status.waits["training"]
        assert wait.what.startswith(f"rank 1 (process {processes[1]} on ")
        assert "the workers start again" in wait.until
        assert wait.since_s == status.ranks[1].heard_s
        assert status.lines[-1] == wait.line
        os.kill(processes[1], signal.SIGCONT)
        while status.waits:
            hear([0, 1])
    assert status.lines[-1].startswith("training waited ")


def test_a_rank_that_holds_the_others_up_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_ranks, "STRAGGLES_S", 1.0)
    status = Status()
    with two_ranks(tmp_path, pause_s=0.1) as (processes, heard):
        while not status.lines:
            for connection in heard:
                status.apply(connection.recv())
            status.notice_stragglers()
    (line,) = status.lines
    assert line.startswith(f"rank 1 (process {processes[1]} on ")
    assert "holds the others up" in line
    status.notice_stragglers()
    assert status.lines == [line]


def test_a_short_delay_and_equal_ranks_are_not_noted() -> None:
    clock = Clock()
    status = Status(clock=clock)
    for own_s in (0.1, 0.5, 0.1, 0.1):
        status.apply(Alive(0, "process 1 on a", 32, 0.1))
        status.apply(Alive(1, "process 2 on a", 32, own_s))
        clock.now += 40
        status.notice_stragglers()
    assert status.lines == []


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_missing_workers_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    status = Status(clock=clock)
    clock.now += 20
    status.notice_silence("2 workers with 1 CPU each")
    assert not status.waits, "a start takes a while"
    clock.now += 20
    status.notice_silence("2 workers with 1 CPU each")
    assert status.waits["the run"].what == "2 workers with 1 CPU each"
    assert status.waits["the run"].since_s == 1000
    status.apply(StartAsked(frozenset({"a"}), 1))
    assert not status.waits
    assert status.lines[-1] == "the run waited 40 s"


def status_of_two_ranks(clock: Clock) -> Status:
    """Return the status after the first sign of life of two ranks on machine a, a second apart."""
    status = Status(clock=clock)
    status.apply(StartAsked(frozenset({"a"}), 1))
    for rank in range(2):
        status.apply(Alive(rank, f"process {rank} on a", 32, 0.1))
        clock.now += 1
    return status


def test_no_rank_is_blamed_where_all_are_silent() -> None:
    """Their machine or the mailbox is gone; the run waits for all of them."""
    clock = Clock()
    status = status_of_two_ranks(clock)
    clock.now += 60
    status.notice_silence("2 workers")
    assert list(status.waits) == ["the run"]
    assert status.waits["the run"].since_s == 1001


def test_ranks_of_an_earlier_group_are_forgotten() -> None:
    clock = Clock()
    status = status_of_two_ranks(clock)
    clock.now += 60
    status.apply(Alive(0, "process 7 on b", 0, 0.1))
    status.notice_silence("1 worker")
    assert not status.waits
