"""The status of a run, as its driver knows it from messages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline.compute.cluster import LeavingNode
from pipeline.errors import SaganError
from pipeline.runs.json_records import Wait
from pipeline.runs.spending import HOUR_S
from pipeline.training.status import slow_ranks
from pipeline.training.status.messages import (
    Alive,
    Failed,
    GroupLost,
    GroupStarted,
    Logged,
    Message,
    NodesLeave,
    Noted,
    NotFiniteAt,
    RoomForMore,
    Scored,
    StartAsked,
    Stepped,
    Stopped,
    Uploaded,
    Waits,
    WentOn,
    WorkerFailed,
)
from pipeline.training.status.slow_ranks import RankSeen, silent_ranks, stragglers


def steady_clock() -> Callable[[], float]:
    """Return a clock of Unix time that goes on evenly from now.

    It ignores corrections of the machine's clock, and it stands still while the machine is suspended.
    """
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


@dataclass
class Status:
    """The status of a run, as its driver knows it.

    Attributes:
        images: Position of the run.
        starts: Number of worker-group starts, over all drivers of the run.
        images_lost: Images that were trained on after the checkpoint from which a later worker group resumed.
        resumed_from: Name of the last checkpoint from which workers resumed; None where none did.
        metrics: Metrics of the last log.
        uploaded: Names of the checkpoints that this driver's workers completed.
        to_score: Names of those that are due for a score beside training.
        scores: (position in images, name of the metric, value) of every score. The value is None where the model
            generates images that are not finite.
        lines: Lines for the console, the oldest first.
        attempts: What workers raised, for every worker group since the newest checkpoint, the oldest group first.
        stopped: Whether the run was asked to stop and its last checkpoint is complete.
        failure: An error that a restart of the workers would not correct.
        train_seconds: Seconds of training up to `images`.
        not_finite: Positions at which values were not finite.
        nodes: Nodes of the present group; empty where no group trains.
        workers: Number of workers in the present group, or in the last one.
        groups: Number of groups that asked this driver for permission to start.
        grows: Whether the present group ends because more workers fit.
        leaving: Nodes of which there was notice that they will be taken away.
        ranks: What was last heard from every rank of the present group.
        waits: What the parts of the run wait for, by the name of the part.
        slow_since_s: Unix time since which a rank takes twice as long as the others, by rank; inf once it is noted.
        last_error: The last error of a worker.
        workers_gone_s: Unix time since which there are no workers, in seconds; None while there are.
        earlier_device_s: Device seconds of all groups before the present one, over all drivers.
        held_since_s: Unix time since which the present group, or the last one, holds its devices.
        scoring_device_s: Device seconds of the GPUs that scored checkpoints for this driver, beside the workers and
            after them.
        logged_images: Number of images between the logs of this driver's groups.
        logged_device_s: Device seconds between these logs.
        clock: Returns the Unix time in seconds. It must not jump, because device hours are counted with it.
    """

    images: int = 0
    starts: int = 0
    images_lost: int = 0
    resumed_from: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    uploaded: list[str] = field(default_factory=list)
    to_score: list[str] = field(default_factory=list)
    scores: list[tuple[int, str, float | None]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    attempts: list[list[WorkerFailed]] = field(default_factory=list)
    stopped: bool = False
    failure: SaganError | None = None
    train_seconds: float = 0.0
    not_finite: set[int] = field(default_factory=set)
    nodes: frozenset[str] = frozenset()
    workers: int = 0
    groups: int = 0
    grows: bool = False
    leaving: set[str] = field(default_factory=set)
    ranks: dict[int, RankSeen] = field(default_factory=dict)
    waits: dict[str, Wait] = field(default_factory=dict)
    slow_since_s: dict[int, float] = field(default_factory=dict)
    last_error: str | None = None
    clock: Callable[[], float] = field(default_factory=steady_clock)
    workers_gone_s: float | None = None
    earlier_device_s: float = 0.0
    held_since_s: float = 0.0
    scoring_device_s: float = 0.0
    logged_images: int = 0
    logged_device_s: float = 0.0
    _logged: tuple[int, float] = (0, 0.0)  # position of the last log, or of the group's start, and train_seconds there
    _scoring_seen_s: float = 0.0  # Unix time up to which `scoring_device_s` counts
    _cut_off: bool = False  # whether a node of the group before left without a complete checkpoint
    _counted: bool = False  # whether `attempts` has the group that the driver started last
    _no_room: bool = False  # whether it was said that the workers have found no room in time

    def __post_init__(self) -> None:
        self.workers_gone_s = self._scoring_seen_s = self.clock()

    @property
    def must_move(self) -> bool:
        """Whether a node of the worker group will be taken away, or was."""
        return not self.nodes.isdisjoint(self.leaving)

    @property
    def must_restart(self) -> bool:
        """Whether the worker group must write a checkpoint and end, so that another one starts."""
        return self.must_move or self.grows

    @property
    def device_hours(self) -> float:
        """Device hours that the run has held, over all drivers.

        A group holds a device for each worker, from the beginning of its processes until it is gone. Waiting for room
        does not count.
        """
        return (self._workers_device_s() + self.scoring_device_s) / HOUR_S

    @property
    def device_s_per_image(self) -> float | None:
        """Mean device seconds that an image took between the logs of this driver; None before there are any."""
        return self.logged_device_s / self.logged_images if self.logged_images else None

    def apply(self, message: Message) -> None:
        """Change the status as a message says."""
        match message:
            case StartAsked():
                self._start_asked(message)
            case NodesLeave(leaving):
                self._nodes_leave(leaving)
            case RoomForMore():
                if self.nodes and not self.grows:
                    self.grows = True
                    self.lines.append("more workers fit: a checkpoint is written, and more workers start")
            case GroupLost(found_no_room, fault):
                if found_no_room and not self._no_room:
                    self._no_room = True
                    self.lines.append("the workers have found no room in time, and as many as fit start")
                if not found_no_room:
                    self.lines.append("the workers are gone, and others start")
                if not (found_no_room or self.stopped or self._counted):
                    self.attempts.append([])
                if fault is not None and self.attempts:
                    self.attempts[-1].append(WorkerFailed(fault, self.images, type(fault).__name__))
                    self.lines.append(f"the workers could not start: {fault.message}")
                self._counted = self.stopped = False  # the next group was not asked to stop
                self._end_group()
                self.workers_gone_s = self.workers_gone_s or self.clock()
            case GroupStarted():
                self._group_started(message)
            case Logged(images, metrics, train_seconds):
                self.logged_images += images - self._logged[0]
                self.logged_device_s += self.workers * (train_seconds - self._logged[1])
                self._logged = images, train_seconds
                self.images, self.metrics, self.train_seconds = images, metrics, train_seconds
            case Stepped(images):
                self.images = max(self.images, images)
            case Alive():
                self._heard(message)
            case Waits(who, what, until):
                self._waits(who, what, until, self.clock())
            case WentOn(who):
                self._went_on(who)
            case Uploaded(checkpoint, to_score):
                self.uploaded.append(checkpoint)
                if to_score:
                    self.to_score.append(checkpoint)
                self.attempts = [[]]
                self.lines.append(f"checkpoint {checkpoint}")
            case Scored(images, metric, value):
                self.scores.append((images, metric, value))
                text = "not finite" if value is None else f"{value:.4g}"
                self.lines.append(f"score at {images / 1000:.1f} kimg: {metric} {text}")
            case Noted(line):
                self.lines.append(line)
            case NotFiniteAt(images):
                self.not_finite.add(images)
            case WorkerFailed(error):
                if not self.attempts:  # a worker may fail before its group asks
                    self.attempts, self._counted = [[]], True
                self.attempts[-1].append(message)
                self.lines.append(f"a worker failed: {error.message}")
                self.last_error = error.message
                self.workers_gone_s = self.workers_gone_s or self.clock()
            case Stopped():
                self.stopped, self.nodes, self.workers_gone_s = True, frozenset(), self.clock()
                self.attempts = self.attempts[:-1]  # the group has not failed
            case Failed(error):
                self.failure = error

    def _workers_device_s(self) -> float:
        until = self.clock() if self.workers_gone_s is None else self.workers_gone_s
        return self.earlier_device_s + self.workers * max(0.0, until - self.held_since_s)

    def _start_asked(self, asked: StartAsked) -> None:
        now = self.clock()
        self.earlier_device_s = self._workers_device_s()
        self.held_since_s = max(now - asked.age_s, now if self.workers_gone_s is None else self.workers_gone_s)
        self._end_group()
        self.attempts.append([])
        self._counted = True
        self.stopped, self.grows, self.nodes, self._no_room = False, False, asked.nodes, False
        if self.workers not in (0, asked.workers):
            self.lines.append(f"training goes on with {asked.workers} instead of {self.workers} workers")
        self.workers, self.groups = asked.workers, self.groups + 1
        self._went_on("the run")
        self.ranks, self.waits, self.slow_since_s, self.workers_gone_s = {}, {}, {}, None

    def _end_group(self) -> None:
        """Note that the group has ended. It has not failed where a node left, of which there was notice."""
        if self.must_move:
            self.attempts = self.attempts[:-1]
            self._cut_off = True
        self.nodes = frozenset()

    def _nodes_leave(self, leaving: Sequence[LeavingNode]) -> None:
        for node in leaving:
            if node.node in self.nodes - self.leaving:
                when = "soon" if node.seconds is None else f"in {node.seconds:.0f} s"
                self.lines.append(
                    f"node {node.host} will be taken away {when}: the workers write a checkpoint and leave it"
                )
        self.leaving.update(node.node for node in leaving)

    def notice_silence(self, workers: str) -> None:
        """Note what no message says: that workers are missing or silent. `workers` describes all workers of the run."""
        now = self.clock()
        if silent := silent_ranks(self.ranks, now):
            names = ", ".join(f"rank {rank} ({self.ranks[rank].process})" for rank in sorted(silent))
            until = "the other ranks raise an error after their time limit, and the workers start again"
            since = min(self.ranks[rank].heard_s for rank in silent)
            self._waits("training", f"{names}, of which nothing was heard", until, since)
        else:
            self._went_on("training")
        if self.ranks and self.workers_gone_s is None:
            last = max(seen.heard_s for seen in self.ranks.values())
            self.workers_gone_s = last if now - last > slow_ranks.SILENT_S else None
        if self.workers_gone_s is not None and now - self.workers_gone_s > slow_ranks.SILENT_S:
            self._waits("the run", workers, "Ray starts them when the cluster has room", self.workers_gone_s)

    def notice_scoring(self, gpus: float) -> None:
        """Note that checkpoints were scored on this number of GPUs since the last call."""
        now = self.clock()
        self.scoring_device_s += gpus * max(0.0, now - self._scoring_seen_s)
        self._scoring_seen_s = now

    def notice_end(self) -> None:
        """Note that Ray Train has returned, so that there are no workers."""
        self.workers_gone_s = self.workers_gone_s or self.clock()

    def notice_stragglers(self) -> None:
        """Note, once for each worker group, a rank that has held the others up for a while."""
        now, slow = self.clock(), stragglers(self.ranks)
        self.slow_since_s = {rank: since for rank, since in self.slow_since_s.items() if rank in slow or since > now}
        for rank, median_s in slow.items():
            seen, since = self.ranks[rank], self.slow_since_s.setdefault(rank, now)
            if now - since > slow_ranks.STRAGGLES_S:
                self.slow_since_s[rank] = math.inf
                self.lines.append(
                    f"rank {rank} ({seen.process}) holds the others up: it works {seen.own_s:.3f} s in a step, and the "
                    f"median of the ranks is {median_s:.3f} s; look at its machine's load, disk and clock rate"
                )

    def _heard(self, message: Alive) -> None:
        """Note that a rank is alive. Another process of a known rank belongs to a new worker group."""
        known = self.ranks.get(message.rank)
        if known is not None and known.process != message.process:
            self.ranks = {}
        self.ranks[message.rank] = RankSeen(message.process, message.images, message.own_s, self.clock())
        self.workers_gone_s = None
        self._went_on("the run")

    def _waits(self, who: str, what: str, until: str, since_s: float) -> None:
        """Note a wait. A wait that is known already keeps its beginning."""
        known = self.waits.get(who)
        wait = Wait(who=who, what=what, until=until, since_s=known.since_s if known else since_s)
        if wait != known:
            self.waits[who] = wait
            self.lines.append(wait.line)

    def _went_on(self, who: str) -> None:
        if (wait := self.waits.pop(who, None)) is not None:
            self.lines.append(f"{who} waited {max(0.0, self.clock() - wait.since_s):.0f} s")

    def _group_started(self, now: GroupStarted) -> None:
        """Count a start. Images that an earlier group trained on beyond its position are lost."""
        self.starts += 1
        lost = max(0, self.images - now.images)
        self.images_lost += lost
        if lost and self._cut_off:
            self.lines.append(
                f"a node was taken away before the checkpoint at {self.images / 1000:.1f} kimg was complete: the one "
                "before it counts. Raise RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S of the nodes, or lower checkpoint.kimg"
            )
        self._cut_off = False
        if now.checkpoint:
            self.resumed_from = now.checkpoint
            reached = f"; the run had reached {self.images / 1000:.1f} kimg" if self.images > now.images else ""
            self.lines.append(f"resumed from {now.checkpoint}{reached}")
        elif self.starts > 1:
            self.lines.append(
                f"started over, because no checkpoint was complete; the run had reached {self.images / 1000:.1f} kimg"
            )
        self.images, self.train_seconds = now.images, now.train_seconds
        self._logged = now.images, now.train_seconds
