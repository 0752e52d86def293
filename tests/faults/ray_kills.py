"""Kills and outages of a training run on a real Ray cluster: the run ends as if nothing had happened.

    python -m tests.faults.ray_kills --seeds 28 [--first N] [--only EVENT ...]

Every seed is a run of its own: two ranks, a tiny network, real images of digits. The cluster has three nodes on this
machine. A real S3 server and a real MLflow server are behind proxies that can close their ports. The events of `EVENTS`
take turns, and the seed chooses the moment: at the start of the workers, after a step, while a checkpoint is uploaded,
or while a checkpoint is scored.

What is promised: the last checkpoint has the bits of the undisturbed run's. Its `metrics.jsonl` and MLflow hold every
point of the undisturbed run once, so the steps cover all images once. The same checkpoints have scores. A kill without
notice loses at most the images since the newest complete checkpoint and those of one step, and every other event loses
none. No temporary folder, no placement group and no unfinished checkpoint is left. Only a driver that was killed or
stopped needs a second command, which is the first one again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from infra.local.server_process import BIN
from infra.local.servers import S3, MlflowServer, Ray
from pipeline.runs.checkpoints import METRICS, LoggedPoint
from pipeline.runs.stored_run import StoredRun
from pipeline.tracking.mlflow_run import client
from tests.faults.kills import KEYS, last_checkpoint, points_by_key
from tests.faults.storage_proxy import FaultProxy, fault_proxy
from tests.system.command_process import Driver, end_drivers, head_process, ray_workers, training_workers
from tests.system.ray_node import RayNode

STEP, INTERVAL, SCORED, LENGTH = 32, 320, 640, 1600  # images of a step, between checkpoints and scores, and of the run
RUN_S = 600.0  # longest time of a command, and of a wait for a moment
SETTLE_S = 60.0  # longest time after a run until Ray has given back what the run held
UPLOAD_S = 2.0  # seconds for which a request of a checkpoint's upload is held back, in which an event happens
NOTICE_S = 60.0  # seconds between the notice and the end of a node
POLL_S = 0.02
RUN = (sys.executable, "-m", "pipeline", "run")

# Positions at which an event may happen. After a late step, a run takes long enough for an event to happen in it.
PHASES = {
    "start": range(1),
    "step": range(STEP, LENGTH - 10 * STEP, STEP),
    "late step": range(LENGTH - 10 * STEP, LENGTH - 5 * STEP, STEP),
    "checkpoint": range(INTERVAL, LENGTH, INTERVAL),
    "score": range(SCORED, LENGTH, SCORED),
}

OVERRIDES: dict[str, Any] = {
    "train.kimg": LENGTH / 1000,
    "train.workers": 2,
    "train.log_kimg": STEP / 1000,
    "checkpoint.kimg": INTERVAL / 1000,
    "evaluate.kimg": SCORED / 1000,
    "track.register": "false",
}


@dataclass
class Cluster:
    """Three Ray nodes with one CPU each, an S3 server and an MLflow server, and the two proxies in front of them.

    The head is the node of the drivers. The other two nodes can be taken away.
    """

    folder: Path
    s3: S3
    mlflow: MlflowServer
    storage: FaultProxy
    tracker: FaultProxy
    head: Ray
    nodes: list[RayNode]
    leaving: list[RayNode]
    """Those of `nodes` that were killed or told to leave."""
    env: dict[str, str]
    """Environment variables of the drivers and of all nodes."""

    bucket = "kills"

    @property
    def address(self) -> str:
        return self.head.env["RAY_ADDRESS"]

    @property
    def temporary(self) -> Path:
        """Folder of the temporary files of all drivers and workers."""
        return self.folder / "tmp"

    def repair(self) -> None:
        """Replace the nodes that were taken away, and wait until Ray has three nodes."""
        for node in self.leaving:
            node.wait_for_end()
            self.nodes.remove(node)
            node.__exit__(None, None, None)
        self.leaving.clear()
        while len(self.nodes) < 2:
            self.nodes.append(RayNode(self.head, cpus=1, drain_s=NOTICE_S, env=self.env).__enter__())
        _wait_for_none(lambda: [] if self._count_nodes() == 3 else [f"{self._count_nodes()} nodes"])

    def end_nodes(self) -> None:
        for node in self.nodes:
            node.__exit__(None, None, None)

    def require_nothing_left(self) -> None:
        """Raise AssertionError where a placement group or a temporary folder of a run that has ended stays."""
        _wait_for_none(lambda: [*self._placement_groups(), *self._temporary_folders()])

    def _count_nodes(self) -> int:
        return sum(node["state"] == "ALIVE" for node in self._state("nodes"))

    def _placement_groups(self) -> Iterator[str]:
        for group in self._state("placement_groups"):
            if group["state"] != "REMOVED":
                yield f"a placement group of job {group['creator_job_id']} is {group['state']}"

    def _temporary_folders(self) -> Iterator[str]:
        for path in self.temporary.iterdir():
            if "sagan-" in path.name or path.name.startswith("checkpoint-"):
                yield str(path)

    def _state(self, of: str) -> list[dict[str, Any]]:
        """Return rows of Ray's state, such as those of `nodes`."""
        request = urllib.request.Request(  # noqa: S310 - http:// of a server of this process
            f"{self.head.address}/api/v0/{of}?limit=10000", headers={"Authorization": f"Bearer {self.head.token}"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            rows: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
            return rows


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start the servers and the nodes. In the `with` block, this process has the credentials of the servers."""
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="sagan-ray-kills-", dir="/tmp")))
        (folder / "tmp").mkdir()  # a short path, as Ray needs
        s3 = held.enter_context(S3(folder / "s3"))
        bucket = s3.bucket(Cluster.bucket)
        mlflow = held.enter_context(MlflowServer(folder / "mlflow", artifacts=f"{bucket}/mlflow"))
        held.enter_context(mock.patch.dict(os.environ, {**s3.env, **mlflow.env}))
        storage = held.enter_context(fault_proxy(s3.url))
        tracker = held.enter_context(fault_proxy(mlflow.uri))
        env = {
            **s3.env,
            **mlflow.env,
            "AWS_ENDPOINT_URL": storage.url(),
            "MLFLOW_TRACKING_URI": tracker.url(),
            "SAGAN_BUCKET": bucket,
            "TMPDIR": str(folder / "tmp"),
        }
        head = held.enter_context(Ray(cpus=1, env=env))
        made = Cluster(folder, s3, mlflow, storage, tracker, head, [], [], env)
        held.callback(made.end_nodes)
        yield made


def _wait_for_none(find: Callable[[], Collection[str]]) -> None:
    """Wait until `find` finds nothing. Raises AssertionError with what it finds after SETTLE_S."""
    until = time.monotonic() + SETTLE_S
    while found := find():
        if time.monotonic() > until:
            raise AssertionError(f"{', '.join(found)} after {SETTLE_S:.0f} s")
        time.sleep(0.2)


@dataclass(frozen=True)
class Moment:
    """When an event happens: in a phase of the run, near the position `images`."""

    phase: str
    images: int

    @classmethod
    def drawn(cls, dice: random.Random, phases: Sequence[str]) -> Moment:
        phase = dice.choice(phases)
        return cls(phase, dice.choice(PHASES[phase]))

    def __str__(self) -> str:
        return f"{self.phase} {self.images}"


@dataclass
class Ended:
    """What became of a run."""

    checkpoint: str
    points: list[LoggedPoint]
    tracked: dict[tuple[int, str], float]
    """Points that MLflow has, by position and key."""
    scored: set[str]
    """Names of the scored checkpoints."""
    images_lost: int
    restarts: int
    seconds: float
    """Time from the first command to the end of the run."""


class Run:
    """One run of the cluster, which meets an event.

    Args:
        made: The cluster.
        name: Name of the run.
        dice: Chooses what the event leaves open.
        submitted: Whether the command is `ray job submit`.
    """

    def __init__(self, made: Cluster, name: str, dice: random.Random, submitted: bool = False) -> None:
        self.cluster, self.name, self.dice = made, name, dice
        self.stored = StoredRun(f"s3://{made.bucket}/runs/{name}")
        self.on_disk = StoredRun(str(made.s3.folder / made.bucket / "runs" / name))
        """The same folder as the S3 server has it, for looks that take no time."""
        job = (str(BIN / "ray"), "job", "submit", "--", "env", f"--chdir={made.folder}")
        self.command = (*job, *RUN) if submitted else RUN
        self.drivers: list[Driver] = []
        self.began = time.monotonic()
        self.happened: float | None = None
        """Unix time of the event in seconds."""
        self.complete = 0
        """Position of the newest complete checkpoint just before the event."""
        self.reached = 0
        """Last position that the workers reached before the event ended them."""
        self.start()

    def start(self) -> None:
        """Give the command, also after an earlier one has ended."""
        self.drivers.append(self.other_driver(self.command))

    def other_driver(self, command: Sequence[str]) -> Driver:
        made = self.cluster
        overrides = {**OVERRIDES, "data.cache": made.folder / "cache"}
        return Driver(made.folder, {**made.head.env, **made.env}, command=command, name=self.name, **overrides)

    @property
    def driver(self) -> Driver:
        return self.drivers[-1]

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for a condition. Raises AssertionError where the command ends before."""
        limit = time.monotonic() + RUN_S
        while not condition():
            if self.driver.process.poll() is not None or time.monotonic() > limit:
                raise AssertionError("the run has not come to the moment of the event")
            time.sleep(POLL_S)

    def end(self, driver: Driver | None = None) -> int:
        """Read the output of a command, by default the last one, to its end. Return the exit code."""
        driver = driver or self.driver
        limit = threading.Timer(RUN_S, driver.process.kill)
        limit.start()
        try:
            return driver.end()
        finally:
            limit.cancel()

    # --- what its processes do ---------------------------------------------------------------------------------------

    def position(self) -> int:
        """Return the last position that the present worker group has logged on this machine; 0 where none has."""
        return max((step for step, _ in self._metrics_files()), default=0)

    def _metrics_files(self) -> Iterator[tuple[int, Path]]:
        """Yield the last position and the folder of every `metrics.jsonl` of a worker."""
        for path in self.cluster.temporary.glob(f"sagan-run-{self.name}-*/{METRICS}"):
            with suppress(OSError):  # its process has ended
                *lines, _ = path.read_text().split("\n")  # the last one is not complete
                if lines:
                    yield json.loads(lines[-1])["step"], path.parent

    def ranks(self) -> tuple[int | None, list[int]]:
        """Return the process of rank 0, None before it has logged, and the other processes.

        Rank 0 has the metrics of a group that started without a checkpoint. A worker holds a file of its folder open.
        """
        workers = training_workers(self.cluster.address)
        owners = {str(folder / ".owner") for _, folder in self._metrics_files()}
        rank0 = next((pid for pid in workers if owners & _open_files(pid)), None)
        return rank0, [pid for pid in workers if pid != rank0]

    def process(self, actor: str) -> int:
        """Wait until one process of an actor's class, or of a task's function, runs. Return its id."""
        found: list[int] = []

        def runs() -> bool:
            found[:] = ray_workers(actor, self.cluster.address)
            return len(found) == 1

        self.until(runs)
        return found[0]

    def a_rank(self) -> int:
        return self.dice.choice(sorted(training_workers(self.cluster.address)))

    def node_of_a_rank(self) -> tuple[RayNode, int]:
        """Return a node with a rank, but not the head, and its raylet."""
        raylets = [_parent(pid) for pid in sorted(training_workers(self.cluster.address))]
        found = [(node, pid) for node in self.cluster.nodes for pid in raylets if pid in node.pids]
        return self.dice.choice(found)

    # --- the event ---------------------------------------------------------------------------------------------------

    def meet(self, event: Event, moment: Moment) -> None:
        """Wait for the moment, and let the event happen."""
        self._wait_for(moment)
        group = training_workers(self.cluster.address)
        self.complete = max((checkpoint.images for checkpoint in self.on_disk.checkpoints()), default=0)
        self.reached = self.position()
        self.happened = time.time()
        event.happen(self)
        while event.kills and any(map(_runs, group)):
            self.reached = max(self.reached, self.position())
            time.sleep(POLL_S)

    def _wait_for(self, moment: Moment) -> None:
        match moment.phase:
            case "start":
                self.until(lambda: len(training_workers(self.cluster.address)) == 2)
            case "step" | "late step":
                self.until(lambda: self.position() >= moment.images)
            case "checkpoint":
                upload, storage = f"*/{self.name}/checkpoints/{moment.images:012}-*", self.cluster.storage
                pattern = upload + self.dice.choice(["", "/manifest.json"])
                before = storage.counts().get("slow_first_byte", 0)
                storage.inject("slow_first_byte", pattern, seconds=UPLOAD_S)
                self.until(lambda: storage.counts().get("slow_first_byte", 0) > before)
            case "score":
                self.until(lambda: self._newest_logged() >= moment.images)
                self.process("_call")

    def _newest_logged(self) -> int:
        """Return a position that the run has passed, also where its workers have ended."""
        return max([self.position(), *(checkpoint.images for checkpoint in self.on_disk.checkpoints())])

    def lose_port(self, proxy: FaultProxy, object: str, longest_s: float) -> None:
        """Close the port of a server at the next request for `object`, for a time that the dice choose."""
        before = proxy.counts().get("refused", 0)
        proxy.inject("refused", object, seconds=self.dice.uniform(2, longest_s))
        self.until(lambda: proxy.counts().get("refused", 0) > before)
        self.happened = time.time()

    # --- the end -----------------------------------------------------------------------------------------------------

    def ended(self) -> Ended:
        """Read the last command's output to its end, and return what is left. Raises AssertionError."""
        if code := self.end():
            raise AssertionError(f"the command ended with exit code {code}")
        seconds, summary = time.monotonic() - self.began, self.stored.summary()
        if summary is None:
            raise AssertionError("the run has no summary")
        self.cluster.require_nothing_left()
        checkpoint, points = last_checkpoint(self.stored)
        return Ended(
            checkpoint,
            points,
            self._tracked(summary.mlflow_run_id),
            {score.checkpoint for score in self.stored.scores()},
            summary.images_lost,
            summary.restarts,
            seconds,
        )

    def _tracked(self, run_id: str) -> dict[tuple[int, str], float]:
        """Return the points that MLflow has. Raises AssertionError where one is twice, and where the run goes on."""
        mlflow, points = client(self.cluster.mlflow.uri), dict[tuple[int, str], float]()
        if (status := mlflow.get_run(run_id).info.status) != "FINISHED":
            raise AssertionError(f"MLflow says that the run is {status}")
        for key in KEYS:
            for point in mlflow.get_metric_history(run_id, key):
                if (point.step, key) in points:
                    raise AssertionError(f"MLflow has {key} at {point.step} twice")
                points[point.step, key] = point.value
        return points


def _runs(pid: int) -> bool:
    with suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty where it has ended and waits for its parent
    return False


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _open_files(pid: int) -> set[str]:
    links = set()
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed in the meantime
                links.add(str(link.readlink()))
    return links


# --- events -----------------------------------------------------------------------------------------------------------


def _kill_worker(run: Run) -> None:
    _, others = run.ranks()
    os.kill(run.dice.choice(sorted(others)), signal.SIGKILL)


def _kill_rank0(run: Run) -> None:
    rank0, _ = run.ranks()
    assert rank0 is not None
    os.kill(rank0, signal.SIGKILL)


def _kill_driver(run: Run) -> None:
    run.driver.signal(signal.SIGKILL)
    run.end()
    run.start()


def _kill_raylet(run: Run) -> None:
    node, raylet = run.node_of_a_rank()
    run.cluster.leaving.append(node)
    os.kill(raylet, signal.SIGKILL)


def _drain(run: Run) -> None:
    node, _ = run.node_of_a_rank()
    run.cluster.leaving.append(node)
    node.give_notice()


def _lose_storage_at_a_checkpoint(run: Run) -> None:
    following = (run.position() // INTERVAL + 1) * INTERVAL
    run.lose_port(run.cluster.storage, f"*/{run.name}/checkpoints/{following:012}-*", 15)


def _stop_job(run: Run) -> None:
    run.cluster.head.stop_jobs()
    run.end()
    run.start()


def _stop_rank(run: Run) -> None:
    with _stopped(run.a_rank()):
        time.sleep(run.dice.uniform(1, 15))


def _kill_controller(run: Run) -> None:
    os.kill(run.process("TrainController"), signal.SIGKILL)


def _kill_controller_unheard(run: Run) -> None:
    """The head is stopped while the controller dies. The driver loses its connection and does not hear of the death."""
    controller = run.process("TrainController")
    with _stopped(head_process(run.cluster.address)):
        os.kill(controller, signal.SIGKILL)
        time.sleep(run.dice.uniform(5, 10))  # Ray waits a second for news of an actor that it has lost


def _lose_last_messages(run: Run) -> None:
    """The driver is stopped until its workers have ended. The mailbox dies with their last messages."""
    with _stopped(run.driver.process.pid):
        run.until(lambda: not [*run.cluster.temporary.glob(f"*sagan-run-{run.name}-*")])
        os.kill(run.process("_Actor"), signal.SIGKILL)


def _start_second_driver(run: Run) -> None:
    """A second driver starts while the first one trains. A stopped rank keeps the run from its end until then."""
    with _stopped(run.a_rank()):
        second = run.other_driver((*RUN, *run.dice.choice([[], ["--fresh"]])))
        code = run.end(second)
    if code != 2 or f"process {run.driver.process.pid} on " not in second.output:
        raise AssertionError(f"the second driver ended with exit code {code}:\n{second.output}")


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@dataclass(frozen=True)
class Event:
    """What happens to a run.

    Attributes:
        phases: Phases of the run in which it may happen.
        happen: Lets it happen.
        kills: Whether it ends the workers without notice.
        restarts: Whether the workers start again.
        submitted: Whether the run is submitted with `ray job submit`.
    """

    phases: Sequence[str]
    happen: Callable[[Run], None]
    kills: bool = False
    restarts: bool = False
    submitted: bool = False


_GROUP = ("start", "step", "checkpoint")
EVENTS = {
    "worker": Event(_GROUP, _kill_worker, kills=True, restarts=True),
    "rank0": Event(("step", "checkpoint"), _kill_rank0, kills=True, restarts=True),
    "driver": Event((*_GROUP, "score"), _kill_driver, kills=True, restarts=True),
    "controller": Event(_GROUP, _kill_controller, kills=True, restarts=True),
    "controller-unheard": Event(_GROUP, _kill_controller_unheard, kills=True, restarts=True),
    "mailbox": Event((*_GROUP, "score"), lambda run: os.kill(run.process("_Actor"), signal.SIGKILL)),
    "mailbox-end": Event(("late step",), _lose_last_messages, restarts=True),
    "scoring": Event(("score",), lambda run: os.kill(run.process("_call"), signal.SIGKILL)),
    "raylet": Event(_GROUP, _kill_raylet, kills=True, restarts=True),
    "drain": Event(("step", "checkpoint"), _drain, restarts=True),
    "s3-commit": Event(("step",), _lose_storage_at_a_checkpoint),
    "s3-score": Event(("score",), lambda run: run.lose_port(run.cluster.storage, "*", 15)),
    "mlflow-end": Event(("late step",), lambda run: run.lose_port(run.cluster.tracker, "*", 20)),
    "two-drivers": Event(("step",), _start_second_driver),
    "job-stop": Event((*_GROUP, "score"), _stop_job, restarts=True, submitted=True),
    "sigstop": Event(("step", "checkpoint"), _stop_rank),
}


# --- promises ---------------------------------------------------------------------------------------------------------


def require_promises(ended: Ended, undisturbed: Ended) -> None:
    """Raise AssertionError where a run differs from the undisturbed run."""
    if ended.checkpoint != undisturbed.checkpoint:
        raise AssertionError(f"the run ended in {ended.checkpoint} and not in {undisturbed.checkpoint}")
    if (steps := [point.step for point in ended.points]) != list(range(STEP, LENGTH + 1, STEP)):
        raise AssertionError(f"the steps do not cover all images once: they end at {steps}")
    expected = points_by_key(undisturbed.points)
    for where, points in (("metrics.jsonl", points_by_key(ended.points)), ("MLflow", ended.tracked)):
        if different := sorted(set(expected.items()) ^ set(points.items()))[:8]:
            raise AssertionError(f"points of {where} differ from those of the undisturbed run: {different}")
    if ended.scored != undisturbed.scored:
        raise AssertionError(f"scored are {ended.scored} and not {undisturbed.scored}")


def recovery(points: Sequence[LoggedPoint], happened: float) -> float | None:
    """Return the longest time in seconds without a new step after an event at a Unix time; None where none follows.

    For an event that ends the workers, this is the time from the event to the first step that the next workers keep.
    """
    times = [point.time_ms / 1000 for point in points]
    pauses = [after - max(before, happened) for before, after in itertools.pairwise([0.0, *times]) if after > happened]
    return max(pauses, default=None)


@dataclass
class Result:
    """A run that has kept all promises, and the seconds after which it went on."""

    moment: Moment
    ended: Ended
    recovery: float | None


def train_undisturbed(made: Cluster) -> Ended:
    """Train the run with which all others are compared. It also packs the images and trains the classifier."""
    made.repair()
    return Run(made, "undisturbed", random.Random(0)).ended()


def check(name: str, seed: int, made: Cluster, undisturbed: Ended) -> Result:
    """Train a run that meets the event `name`. Raises AssertionError where a promise is broken."""
    made.repair()
    event, dice = EVENTS[name], random.Random(seed)
    moment = Moment.drawn(dice, event.phases)
    run = Run(made, f"{name}-{seed}", dice, event.submitted)
    try:
        run.meet(event, moment)
        ended = run.ended()
        require_promises(ended, undisturbed)
        most = run.reached + STEP - run.complete if event.kills else 0
        if ended.images_lost > most:
            raise AssertionError(f"{ended.images_lost} images were lost; at most {most} may be")
        if ended.restarts and not event.restarts:
            raise AssertionError(f"the workers started again {ended.restarts} times")
    except Exception as failure:  # a broken promise, or a moment that did not come
        end_drivers()
        raise AssertionError(f"{name}, {moment}: {failure}\n{_keep(run)}") from failure
    finally:
        made.storage.clear()
        made.tracker.clear()
    assert run.happened is not None
    return Result(moment, ended, recovery(ended.points, run.happened))


def _keep(run: Run) -> str:
    """Keep what a failed run has left. Return a text that says where, with the last lines of its commands."""
    kept, lines = Path(tempfile.mkdtemp(prefix=f"ray-kills-{run.name}-")), []
    for number, driver in enumerate(run.drivers):
        if driver.process.stdout is not None and not driver.process.stdout.closed:
            driver.end()
        (kept / f"command{number}.log").write_text(driver.output)
        lines += driver.output.splitlines()[-10:]
    logs = run.cluster.head.scratch / "ray" / "session_latest" / "logs"
    for source, target in ((Path(run.on_disk.url), kept / "run"), (logs, kept / "ray")):
        with suppress(OSError, shutil.Error):  # files that are deleted meanwhile
            shutil.copytree(source, target)
    return "\n".join([*lines, f"its output, its folder and Ray's logs: {kept}"])


# --- the command ------------------------------------------------------------------------------------------------------


def table(runs: Counter[str], held: dict[str, list[Result]]) -> str:
    """Return the figures of every event as a table in Markdown.

    Args:
        runs: Number of runs by event.
        held: Results of the runs that kept all promises, by event.
    """
    lines = ["| event | runs | held | seconds | recovery, median | recovery, worst | images lost, most |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, count in runs.items():
        results = held[name]
        pauses = [result.recovery for result in results if result.recovery is not None]
        seconds = _shown([result.ended.seconds for result in results], statistics.median)
        lost = max((result.ended.images_lost for result in results), default="–")
        median, worst = _shown(pauses, statistics.median), _shown(pauses, max)
        lines.append(f"| {name} | {count} | {len(results)} | {seconds} | {median} | {worst} | {lost} |")
    return "\n".join(lines)


def _shown(seconds: Sequence[float], figure: Callable[[Sequence[float]], float]) -> str:
    return f"{figure(seconds):.1f} s" if seconds else "–"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2 * len(EVENTS), help="number of seeds")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--only", nargs="+", choices=EVENTS, default=[*EVENTS], help="events, which take turns")
    options = parser.parse_args()
    runs, held = Counter[str](), defaultdict[str, list[Result]](list)
    with cluster() as made:
        undisturbed = train_undisturbed(made)
        print(f"undisturbed: {undisturbed.seconds:.1f} s, with packing and the training of a classifier", flush=True)
        for seed in range(options.first, options.first + options.seeds):
            name = options.only[seed % len(options.only)]
            runs[name] += 1
            try:
                result = check(name, seed, made, undisturbed)
            except AssertionError as failure:
                again = f"python -m tests.faults.ray_kills --only {name} --first {seed} --seeds 1"
                print(f"FAILED seed {seed}: {failure}\nrepeat it with: {again}", flush=True)
                continue
            held[name].append(result)
            pause = "no step followed" if result.recovery is None else f"recovery {result.recovery:.1f} s"
            figures = f"{result.ended.seconds:.1f} s, {pause}, {result.ended.images_lost} images lost"
            print(f"seed {seed}, {name}, {result.moment}: held, {figures}", flush=True)
    failures = runs.total() - sum(map(len, held.values()))
    print(f"{table(runs, held)}\n\n{runs.total()} runs, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
