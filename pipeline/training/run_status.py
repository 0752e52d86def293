"""The status of a run: messages of workers and evaluation tasks to the driver, and the state that results from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.compute.cluster import LeavingNode
from pipeline.errors import EnvironmentFault, LastingFault, SaganError


@dataclass(frozen=True)
class GroupStarted:
    """A worker group starts at position `images`, from a checkpoint or, where it is None, from the beginning."""

    images: int
    checkpoint: str | None
    train_seconds: float


@dataclass(frozen=True)
class Logged:
    """Metrics of a log at position `images`, and the seconds of training up to it."""

    images: int
    metrics: dict[str, float]
    train_seconds: float


@dataclass(frozen=True)
class Stepped:
    """A rank has completed a step that ends at position `images`."""

    rank: int
    images: int


@dataclass(frozen=True)
class Uploaded:
    """A checkpoint is complete. `to_score` says whether it is due for a score beside training."""

    checkpoint: str
    to_score: bool


@dataclass(frozen=True)
class Scored:
    """A checkpoint at position `images` has a score. `value` is None where its samples are not finite."""

    images: int
    metric: str
    value: float | None


@dataclass(frozen=True)
class Noted:
    """A line for the driver's console."""

    line: str


@dataclass(frozen=True)
class StartAsked:
    """A worker group on these nodes asks for permission to start. The driver answers with a `Start`."""

    nodes: frozenset[str]


@dataclass(frozen=True)
class NodesLeave:
    """Nodes of the cluster will be taken away."""

    leaving: Sequence[LeavingNode]


@dataclass(frozen=True)
class NotFiniteAt:
    """Values of the step that ends at position `images` are not finite. The driver answers whether they were before."""

    images: int


@dataclass(frozen=True)
class WorkerFailed:
    """A worker has raised an exception, and Ray Train starts the workers again.

    Attributes:
        error: What the worker raised. Exceptions of other libraries become a SaganError with their name and message.
        images: Position at which the worker failed.
        kind: Name of the exception's class.
    """

    error: SaganError
    images: int
    kind: str

    @property
    def waiting_helps(self) -> bool:
        """Whether the cause can end by itself."""
        return isinstance(self.error, EnvironmentFault) and not isinstance(self.error, LastingFault)


@dataclass(frozen=True)
class Stopped:
    """A worker group that was asked to stop has a complete checkpoint, or stopped before its first step."""


@dataclass(frozen=True)
class Failed:
    """An error that ends the run, because a restart of the workers would not correct it."""

    error: SaganError


Message = (
    StartAsked
    | NodesLeave
    | GroupStarted
    | Logged
    | Stepped
    | Uploaded
    | Scored
    | Noted
    | NotFiniteAt
    | WorkerFailed
    | Stopped
    | Failed
)


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
        positions: Last completed position of every rank of the present group.
        not_finite: Positions at which values were not finite.
        nodes: Nodes of the present group; empty where no group trains.
        leaving: Nodes of which there was notice that they will be taken away.
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
    positions: dict[int, int] = field(default_factory=dict)
    not_finite: set[int] = field(default_factory=set)
    nodes: frozenset[str] = frozenset()
    leaving: set[str] = field(default_factory=set)

    @property
    def must_move(self) -> bool:
        """Whether a node of the worker group will be taken away, or was."""
        return not self.nodes.isdisjoint(self.leaving)

    def apply(self, message: Message) -> None:
        """Change the status as a message says."""
        match message:
            case StartAsked(nodes):
                self._start_asked(nodes)
            case NodesLeave(leaving):
                self._nodes_leave(leaving)
            case GroupStarted():
                self._group_started(message)
            case Logged(images, metrics, train_seconds):
                self.images, self.metrics, self.train_seconds = images, metrics, train_seconds
            case Stepped(rank, images):
                self.positions[rank] = images
                self.images = max(self.images, images)
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
                self.attempts = self.attempts or [[]]  # a worker may fail before its group asks
                self.attempts[-1].append(message)
                self.lines.append(f"a worker failed: {error.message}")
            case Stopped():
                self.stopped, self.nodes = True, frozenset()
                self.attempts = self.attempts[:-1]  # the group has not failed
            case Failed(error):
                self.failure = error

    def _start_asked(self, nodes: frozenset[str]) -> None:
        if self.must_move:
            self.attempts = self.attempts[:-1]  # the group before lost a node, of which there was notice
        self.attempts.append([])
        self.stopped, self.nodes = False, nodes

    def _nodes_leave(self, leaving: Sequence[LeavingNode]) -> None:
        for node in leaving:
            if node.node in self.nodes - self.leaving:
                when = "soon" if node.seconds is None else f"in {node.seconds:.0f} s"
                self.lines.append(
                    f"node {node.host} will be taken away {when}: the workers write a checkpoint and leave it"
                )
        self.leaving.update(node.node for node in leaving)

    def _group_started(self, now: GroupStarted) -> None:
        """Count a start. Images that an earlier group trained on beyond its position are lost."""
        self.starts += 1
        self.images_lost += max(0, self.images - now.images)
        if now.checkpoint:
            self.resumed_from = now.checkpoint
            reached = f"; the run had reached {self.images / 1000:.1f} kimg" if self.images > now.images else ""
            self.lines.append(f"resumed from {now.checkpoint}{reached}")
        elif self.starts > 1:
            self.lines.append(
                f"started over, because no checkpoint was complete; the run had reached {self.images / 1000:.1f} kimg"
            )
        self.images, self.train_seconds, self.positions = now.images, now.train_seconds, {}
