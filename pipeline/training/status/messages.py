"""Messages of workers and evaluation tasks to the driver of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.compute.cluster import LeavingNode
from pipeline.errors import EnvironmentFault, LastingFault, SaganError

ALIVE_S = 5.0  # seconds between two signs of a rank


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
    """The ranks have completed a step that ends at position `images`."""

    images: int


@dataclass(frozen=True)
class Alive:
    """The process of a rank runs. A thread sends it every few seconds, also while the rank waits for others.

    Attributes:
        rank: Rank in the present worker group.
        process: Machine and process id, for people.
        images: Last completed position of the rank.
        own_s: Seconds that the rank works in a step, without waiting for other ranks.
    """

    rank: int
    process: str
    images: int
    own_s: float


@dataclass(frozen=True)
class Waits:
    """A part of the run waits.

    Attributes:
        who: The part, such as `checkpoint 000000036000-d60d37b7`.
        what: What it waits for.
        until: What ends the wait.
    """

    who: str
    what: str
    until: str


@dataclass(frozen=True)
class WentOn:
    """A part of the run that waited waits no more."""

    who: str


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
    workers: int
    """Number of workers in the group."""
    age_s: float = 0.0
    """Seconds since the process of rank 0 began, for which the group has held its devices."""


@dataclass(frozen=True)
class NodesLeave:
    """Nodes of the cluster will be taken away."""

    leaving: Sequence[LeavingNode]


@dataclass(frozen=True)
class RoomForMore:
    """More workers fit into the cluster than the group has. It writes a checkpoint, and a larger group starts."""


@dataclass(frozen=True)
class GroupLost:
    """Ray Train has given up a worker group, and the driver starts another one."""

    found_no_room: bool
    """Whether the group has not started, because the cluster had no room for it in time."""
    fault: SaganError | None = None
    """Why Ray Train could not start the group, where that is known."""


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
    | RoomForMore
    | GroupLost
    | GroupStarted
    | Logged
    | Stepped
    | Alive
    | Waits
    | WentOn
    | Uploaded
    | Scored
    | Noted
    | NotFiniteAt
    | WorkerFailed
    | Stopped
    | Failed
)
