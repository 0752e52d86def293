"""Room of training runs in the cluster: whether another one may start, and what ended ones give back.

The runs are the trials of a sweep or the runs of a study.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pipeline.compute.resources import (
    fits,
    free_resources,
    node_resources,
    placement_groups,
    release_placement_groups,
)
from pipeline.config.schema import TrainJob
from pipeline.training import worker_group

_LOOK_S = 1.0  # seconds between two looks at the cluster
_SAID_S = 30.0  # seconds of waiting after which it is said
_ANEW_S = 10.0  # Ray Train makes a group that waits anew after a minute, and none waits for a moment


@dataclass(frozen=True)
class TrialNeeds:
    """What a trial needs at the same time. An amount is a number of CPUs or GPUs, by name ("CPU", "GPU")."""

    workers: int
    worker: Mapping[str, float]
    """What each worker needs."""
    scoring: Sequence[Mapping[str, float]]
    """What each process needs that scores checkpoints beside training."""
    driver_cpus: float = 0.0
    """CPUs of a process that drives the trial. A thread of this driver needs none."""

    @classmethod
    def of(cls, job: TrainJob, driver_cpus: float = 0.0) -> TrialNeeds:
        """Return what a run of a job needs. The cluster must be connected.

        Where the cluster cannot hold the processes that score beside training, rank 0 scores, and needs nothing more.
        """
        worker, scoring = worker_group.needs(job)
        workers = job.train.least_workers
        beside = fits(node_resources(), workers, worker, scoring)
        return cls(workers, worker, scoring if beside else [], driver_cpus)

    @classmethod
    def greatest(cls, needs: Sequence[TrialNeeds]) -> TrialNeeds:
        """Return needs in which those of each of several runs fit."""
        return cls(
            max(one.workers for one in needs),
            {name: max(one.worker[name] for one in needs) for name in ("CPU", "GPU")},
            max((one.scoring for one in needs), key=_amounts),
            max(one.driver_cpus for one in needs),
        )


@dataclass(frozen=True)
class Room:
    """What the cluster has for the trials."""

    free: Sequence[Mapping[str, float]]
    """CPUs and GPUs that are free on each node."""
    placed: int
    """Number of running trials whose workers have their resources."""

    def holds_another(self, trial: TrialNeeds, running: int) -> bool:
        """Return whether another trial fits on what is free, with the processes that score its checkpoints.

        Room is left for those of the `running` trials that have not got theirs yet.
        """
        trials = max(0, running - self.placed) + 1
        driver = [{"CPU": trial.driver_cpus, "GPU": 0.0}] if trial.driver_cpus else []
        return fits(self.free, trials * trial.workers, trial.worker, [*driver, *trials * [*trial.scoring]])


class TrialRoom:
    """A thread that looks at the cluster every second while a sweep or a study runs.

    It removes the placement groups of trials that have ended or whose process has died, and says what the sweep waits
    for.

    Args:
        owner: The sweep or the study, for messages.
        trial: What each trial needs.
        shown: The workers of a trial, for messages.
        noun: What a trial is called in messages.
    """

    def __init__(self, owner: str, trial: TrialNeeds, shown: str, noun: str = "trial") -> None:
        self._owner, self._trial, self._shown, self._noun = owner, trial, shown, noun
        self._room: Room | None = None
        self._held_back = _Wait(_LOOK_S)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="trial-room", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def may_start(self, running: int) -> bool:
        """Return whether another trial may start beside `running` trials.

        The first trial may always start. Its workers wait in Ray, so that an autoscaler sees what they need.
        """
        if running == 0:
            return True
        may = self._room is not None and self._room.holds_another(self._trial, running)
        if self._held_back.lasts(not may):
            print(
                f"{self._owner} waits for room for another {self._noun} beside {running}: {self._shown}, and its "
                f"scores; the {self._noun} starts when this is free",
                flush=True,
            )
        return may

    def _watch(self) -> None:
        waiting = _Wait(_ANEW_S)
        while not self._ended.wait(_LOOK_S):
            with suppress(Exception):  # the head does not answer, and Ray raises errors of many kinds then
                release_placement_groups(placement_groups())
                groups, free = placement_groups(), free_resources()
                # A group that ended between the two calls would be counted in both: no trial starts at this look.
                self._room = Room(free, groups.placed) if placement_groups() == groups else None
                if waiting.lasts(groups.waiting > 0):
                    print(
                        f"{groups.waiting} running {self._noun}s of {self._owner} wait for room: {self._shown}; Ray "
                        "starts them when the cluster has it",
                        flush=True,
                    )


class _Wait:
    """A wait that is said once. It has ended when nothing has waited for `pause_s` seconds."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._since: float | None = None
        self._seen = 0.0
        self._said = False

    def lasts(self, waits: bool) -> bool:
        """Note whether something waits now. Return True once, when it has waited for half a minute."""
        now = time.monotonic()
        if waits:
            self._since, self._seen = self._since or now, now
        elif now > self._seen + self._pause_s:
            self._since, self._said = None, False
        if self._since is None or self._said or now < self._since + _SAID_S:
            return False
        self._said = True
        return True


def _amounts(processes: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Return the GPUs and the CPUs of all processes together."""
    return sum(one["GPU"] for one in processes), sum(one["CPU"] for one in processes)
