"""Reads changed inputs, each in a process of its own, and judges what happens.

Each input is a clean example of its kind with a few changes. A process that is forked from one that has imported
everything runs the command with a limit of memory, an empty home and a folder of its own. Files of somebody else lie
beside it, and the changes write their paths into the inputs. An audit hook records every file that is opened for
writing or deleted outside the folder, every program that is started and every connection.

An input is refused where the command ends with an error of `pipeline.errors`, or accepted and right. Everything else is
a failure, and its files are kept.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from random import Random

import typer.main

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # a process with threads must not fork

from pipeline import cli  # noqa: E402
from pipeline.evaluation.extractors.published_networks import import_torch_fidelity  # noqa: E402
from tests.faults.hostile import all_kinds  # noqa: E402
from tests.faults.hostile.all_kinds import KINDS  # noqa: E402
from tests.faults.hostile.kind import Kind  # noqa: E402

# What the commands import while they run. torch imports `_dynamo`, and much with it, for its first optimiser.
_IMPORTED = (
    *("pipeline.collection.verify", "pipeline.evaluation.evaluate_model", "pipeline.job_runner", "pipeline.image_grid"),
    *("pipeline.packing.pack", "pipeline.report.write_report", "pipeline.tracking.init_source", "sagan.cost"),
    "pipeline.importing.import_model",
    *("mlflow.pyfunc", "mlflow.store.model_registry.sqlalchemy_store", "mlflow.store.tracking.sqlalchemy_store"),
    *("pandas", "pyarrow.parquet", "torch._dynamo"),
)
SECONDS, MOST_MORE = 30.0, 2**30
_DATA_LIMIT, _FILE_LIMIT = 4 * 2**30, 2**30  # bytes: memory beyond that of the forking process, and a file
_EXCEPTION = 70  # exit status of a process that ends with an exception that is no SaganError
_PARALLEL = 3  # on two cores, since this process works while it starts and ends another one

REFUSED, RIGHT = "refused", "accepted and right"
FAILURES = ("wrong", "exceptions", "signals", "outside", "> 30 s", "> 1 GB")
_WRITES = {"os.truncate", "os.chmod"}
_CHANGES_OF_FOLDERS = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}  # they follow no link
_STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect"}


@dataclass(frozen=True)
class Outcome:
    """What one input led to: REFUSED, RIGHT or some of FAILURES, and the greatest memory of its process in bytes."""

    what: list[str]
    memory: int
    printed: str


@dataclass
class Running:
    """A process that reads one input in the folder `slot`. `handle` becomes readable when it ends."""

    kind: str
    number: int
    slot: Path
    pid: int
    handle: int
    began: float


@dataclass
class Ground:
    """The folders of a run of the fuzzer: clean inputs, a canary tree, and a slot for each process."""

    root: Path
    seed: int
    failures: Path
    show: bool = False
    """Whether to print what commands print."""
    memory: dict[str, int] = field(default_factory=dict)
    """Greatest memory of the process that reads the clean input, by kind."""

    def __post_init__(self) -> None:
        self.clean, self.canary = self.root / "clean", self.root / "canary"
        self.names = [
            *(str(self.canary / name) for name in ("id.tar", "id", ".bashrc")),
            *("../" * up + f"canary/{name}" for up in (1, 2, 3, 4, 5, 6) for name in ("id.tar", "id")),
            *("../home/.bashrc", "../../home/.profile", "canary", "../out", "../in", ".."),
        ]

    def plant(self) -> None:
        """Import everything, and write the clean inputs and the canary tree.

        Another process makes the clean inputs, since this starts threads.
        """
        import_torch_fidelity()
        for module in _IMPORTED:
            importlib.import_module(module)
        cli.app = typer.main.get_command(cli.app)  # type: ignore[assignment]  # once here, instead of in every process
        self.clean.mkdir()
        (self.root / "slots").mkdir()
        builder = multiprocessing.get_context("fork").Process(target=all_kinds.build, args=(self.clean,))
        builder.start()
        builder.join()
        if builder.exitcode:
            raise SystemExit("the clean inputs cannot be made")
        for name in ("id.tar", "id", ".bashrc", "deep/train-00000.tar", "deep/manifest.json"):
            path = self.canary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("mine")
        gc.collect()
        gc.freeze()  # the collector of a forked process would copy every page that has objects

    def state(self) -> set[tuple[str, int, int, int]]:
        """Return path, mode, size and time of change of every file that no command may change, and of the folders.

        Unlike the time of modification, the time of change cannot be set back.
        """
        found, folders = set(), [self.canary, self.clean]
        for folder in folders:  # grows
            with os.scandir(folder) as entries:
                for entry in entries:
                    facts = entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                        found.add((entry.path, facts.st_mode, 0, 0))
                    else:
                        found.add((entry.path, facts.st_mode, facts.st_size, facts.st_ctime_ns))
        return found | {(entry.path, 0, 0, 0) for entry in os.scandir(self.root)}


# --- in the process of an input --------------------------------------------------------------------------------------


def _run(ground: Ground, name: str, number: int | None, slot: Path) -> int:
    """Change a copy of the clean input, read it, and return the exit status. `number` None means no change."""
    kind = KINDS[name]
    source, out = slot / "in", slot / "out"
    shutil.copytree(ground.clean / kind.folder, source)
    if number is not None:
        kind.change(source, Random(f"{ground.seed}:{name}:{number}"), ground.names)
    os.chdir(out)
    os.environ.update(HOME=str(slot / "home"), TMPDIR=str(slot / "tmp"), MPLCONFIGDIR=str(slot / "tmp"))
    os.environ.pop("RAY_ADDRESS", None)
    tempfile.tempdir = None
    for limit, most in ((resource.RLIMIT_DATA, _data_bytes() + _DATA_LIMIT), (resource.RLIMIT_FSIZE, _FILE_LIMIT)):
        resource.setrlimit(limit, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("default")
    _watch(slot)
    try:
        kind.read(source, out)
    except SystemExit as end:
        return int(end.code or 0) if isinstance(end.code, int | None) else 1
    return 0


def _data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmData:")[2].split()[0])


def _watch(slot: Path) -> None:
    """Record in the file `outside` whatever this process changes outside its folders, starts or connects to."""
    record = os.open(slot / "outside", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    allowed = tuple(os.path.realpath(slot / name) for name in ("in", "out", "tmp", "home/.cache/sagan"))

    def is_own(path: object, follow: bool = True) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a file that is open already
        folder, name = os.path.split(os.fsdecode(path).rstrip("/"))
        real = os.path.realpath(os.fsdecode(path)) if follow else f"{os.path.realpath(folder)}/{name}"
        above = tuple(str(parent) for parent in Path(allowed[-1]).parents[:2])
        return real.startswith(allowed) or real in above or real.startswith(("/dev/null", "/dev/shm", "/proc/self"))

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) or is_own(path):
                return
        elif event in _WRITES:
            if is_own(arguments[0]):
                return
        elif event in _CHANGES_OF_FOLDERS:
            paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[event == "os.symlink" :][:1]
            if all(is_own(path, follow=False) for path in paths):
                return
        elif event not in _STARTS:
            return
        os.write(record, f"{event} {arguments!r:.300}\n".encode(errors="backslashreplace"))

    sys.addaudithook(hook)


def _start(ground: Ground, name: str, number: int | None, slot: Path) -> Running:
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        status = _EXCEPTION
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            shutil.rmtree(slot, ignore_errors=True)
            for folder in ("out", "tmp", "home"):
                (slot / folder).mkdir(parents=True)
            fd = os.open(slot / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(fd, stream)
            sys.stdout, sys.stderr = (TextIOWrapper(os.fdopen(os.dup(stream), "wb")) for stream in (1, 2))
            status = _run(ground, name, number, slot)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    return Running(name, number or 0, slot, pid, os.pidfd_open(pid), began)


# --- in the process of the fuzzer ------------------------------------------------------------------------------------


def _end(ground: Ground, running: Running, late: bool) -> Outcome:
    """Wait for the end of a process, and judge what it did."""
    with contextlib.suppress(ProcessLookupError):
        if late:
            os.killpg(running.pid, signal.SIGKILL)
    _, status, usage = os.wait4(running.pid, 0)
    os.close(running.handle)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)  # processes that it started
    slot, memory = running.slot, usage.ru_maxrss * 1024
    printed = (slot / "printed").read_bytes().decode(errors="replace") if (slot / "printed").exists() else ""
    what = []
    if late:
        what.append("> 30 s")
    elif os.WIFSIGNALED(status):
        what.append("signals")
    elif os.WEXITSTATUS(status) == _EXCEPTION or "Traceback (most recent call last)" in printed:
        what.append("exceptions")
    elif _controls_terminal(printed) or not _is_expected(KINDS[running.kind], os.WEXITSTATUS(status), slot, printed):
        what.append("wrong")
    if (slot / "outside").exists() and (recorded := (slot / "outside").read_text()):
        what.append("outside")
        printed += f"\noutside:\n{recorded}"
    if memory > ground.memory.get(running.kind, memory) + MOST_MORE:
        what.append("> 1 GB")
    return Outcome(what or [RIGHT if os.WEXITSTATUS(status) == 0 else REFUSED], memory, printed)


def _is_expected(kind: Kind, status: int, slot: Path, printed: str) -> bool:
    if status:
        return status in (1, 2, 3) and any(line.startswith("error: ") for line in printed.splitlines())
    try:
        return kind.is_right(slot / "out", printed)
    except Exception:
        return False


def _controls_terminal(printed: str) -> bool:
    return any((ord(letter) < 32 and letter not in "\n\t\r") or letter in "\x7f\u202e" for letter in printed)


def measure_clean(ground: Ground) -> None:
    """Read every clean input. Raises SystemExit where one is not accepted."""
    for name in KINDS:
        running = _start(ground, name, None, ground.root / "slots" / "0")
        _, _, _ = select.select([running.handle], [], [], SECONDS)
        outcome = _end(ground, running, late=False)
        if outcome.what != [RIGHT]:
            raise SystemExit(f"the clean input of {name} is {', '.join(outcome.what)}:\n{outcome.printed}")
        ground.memory[name] = outcome.memory


def inputs_in_turn() -> Iterator[tuple[str, int]]:
    """Yield kinds and numbers of inputs, endlessly, by the shares of the kinds."""
    given: Counter[str] = Counter()
    while True:
        name = min(KINDS, key=lambda name: (given[name] + 1) / KINDS[name].share)
        yield name, given[name]
        given[name] += 1


def read_inputs(
    ground: Ground, inputs: Iterator[tuple[str, int]], until: float, counts: dict[str, Counter[str]]
) -> None:
    """Read inputs until there are no more or until a time.

    Args:
        ground: Where the inputs are read.
        inputs: Kinds and numbers.
        until: Time by the monotonic clock.
        counts: What the inputs led to, by row of the table. The function adds to it.
    """
    running: dict[int, Running] = {}
    free = [ground.root / "slots" / str(n) for n in range(_PARALLEL)]
    state, reported = ground.state(), time.monotonic()
    try:
        while True:
            while free and time.monotonic() < until and (following := next(inputs, None)) is not None:
                one = _start(ground, *following, free.pop())
                running[one.handle] = one
            if not running:
                return
            first = min(one.began for one in running.values()) + SECONDS
            ended, _, _ = select.select(list(running), [], [], max(0.0, first - time.monotonic()))
            late = [h for h, one in running.items() if h not in ended and time.monotonic() > one.began + SECONDS]
            for handle in [*ended, *late]:
                one = running.pop(handle)
                outcome = _end(ground, one, handle in late)
                if (now := ground.state()) != state:
                    changed = "\n".join(sorted({path for path, *_ in now ^ state}))
                    what = sorted({*outcome.what, "outside"} - {RIGHT, REFUSED})
                    outcome = Outcome(what, outcome.memory, f"{outcome.printed}\noutside:\n{changed}\n")
                    state = now
                if ground.show:
                    print(outcome.printed.encode(errors="backslashreplace").decode(), end="", flush=True)
                counts.setdefault(KINDS[one.kind].row, Counter()).update(["tried", *outcome.what])
                if set(outcome.what) & set(FAILURES):
                    _keep(ground, one, outcome)
                free.append(one.slot)
            if time.monotonic() - reported > 10:
                reported = time.monotonic()
                failed = sum(count[what] for count in counts.values() for what in FAILURES)
                tried = sum(count["tried"] for count in counts.values())
                print(f"{tried:,} inputs, {failed} failures", file=sys.stderr, flush=True)
    finally:
        for one in running.values():
            _end(ground, one, late=True)


def _keep(ground: Ground, one: Running, outcome: Outcome) -> None:
    folder = ground.failures / f"{one.kind}:{one.number}".replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if (one.slot / "in").exists():
        shutil.copytree(one.slot / "in", folder / "in", symlinks=True)
    how = f"python -m tests.faults.hostile --seed {ground.seed} --only '{one.kind}:{one.number}'"
    (folder / "how.txt").write_text(f"{', '.join(outcome.what)}\n{how}\n\n{outcome.printed}", errors="backslashreplace")
    last = next((line for line in reversed(outcome.printed.splitlines()) if line.strip()), "")
    print(f"{one.kind}:{one.number}: {', '.join(outcome.what)}: {last[:300]!a}", file=sys.stderr, flush=True)
