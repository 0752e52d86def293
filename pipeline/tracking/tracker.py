"""An MLflow run that training writes to and never waits for."""

from __future__ import annotations

import itertools
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.schema import TrainJob
from pipeline.errors import EnvironmentFault

log = logging.getLogger(__name__)

BATCH = 1000  # MLflow takes no more metrics in one call
MOST_WAITING = 200_000  # what an outage may keep back in memory
RETRY_S = 5.0
PARENT_RUN = "mlflow.parentRunId"


class Point(NamedTuple):
    key: str
    value: float
    step: int
    time_ms: int


class Upload(NamedTuple):
    local: Path
    folder: str


def default_uri() -> str:
    """MLFLOW_TRACKING_URI, else a database below runs/ where the command runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs/mlflow.db').resolve()}"


def tracking_uri(job: TrainJob) -> str:
    """The job's own, else the default."""
    return job.track.uri or default_uri()


def client(uri: str) -> Any:
    """An MlflowClient that gives up on a silent server after seconds instead of minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", str(sys.stderr.isatty()))
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class Tracker:
    """Metrics, pictures and files of one run, delivered in the order given by a thread of its own.

    `log` and `artifact` return at once and never raise. What the run holds already, by key and step, is not sent again,
    so a resumed run may offer all its points anew. What a server does not take now is offered to it again until `close`
    gives up; one warning is logged per outage.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        """Continue a run that exists."""
        self.uri, self.run_id = uri, run_id
        self._waiting: deque[Point | Upload] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._deadline = math.inf
        self._lost = 0
        self._held: dict[str, set[int]] = {}  # key → steps that the run has
        self._thread = threading.Thread(target=self._deliver_all, name="tracker", daemon=True)
        self._thread.start()

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        run_name: str,
        run_id: str | None,
        params: dict[str, Any],
        tags: dict[str, str],
        artifacts: str | None,
        parent: str | None = None,
    ) -> Tracker:
        """Create a run, or resume `run_id`, with params and tags (a param that the run has keeps its value).

        `artifacts` is where a new experiment keeps its files; `parent` the run that this one belongs to.
        Raises EnvironmentFault where MLflow cannot be reached or refuses.
        """
        from mlflow.entities import Param, RunTag
        from mlflow.exceptions import MlflowException

        try:
            mlflow = client(uri)
            if run_id is None:
                experiment_id = _experiment(mlflow, experiment, artifacts)
                run_id = str(mlflow.create_run(experiment_id, run_name=run_name).info.run_id)
            else:
                mlflow.update_run(run_id, status="RUNNING")
            has = mlflow.get_run(run_id).data.params
            new = [Param(key, str(value)) for key, value in params.items() if key not in has]
            all_tags = {**tags, **({PARENT_RUN: parent} if parent else {})}
            for i in range(0, max(len(new), 1), 100):  # MLflow takes no more params in one call
                mlflow.log_batch(run_id, params=new[i : i + 100], tags=[RunTag(k, str(v)) for k, v in all_tags.items()])
        except (MlflowException, OSError) as error:
            raise EnvironmentFault(
                f"MLflow at {uri} cannot be used: {_first_line(error)}",
                "start it (mlflow server …), or correct track.uri or MLFLOW_TRACKING_URI; "
                "track.uri=sqlite:///FILE needs no server",
            ) from error
        return cls(uri, run_id)

    def log(self, metrics: dict[str, float], step: int, time_ms: int) -> None:
        """Points of one step; `step` is a position in images, `time_ms` when they were taken."""
        self._put(*(Point(key, float(value), step, time_ms) for key, value in metrics.items()))

    def artifact(self, local: Path, folder: str = "") -> None:
        """Upload a file into the run's `folder`. It is read when its turn comes, not now."""
        self._put(Upload(local, folder))

    def close(self, timeout_s: float) -> int:
        """Deliver what waits, for at most so long; returns how many points and files did not reach the server."""
        with self._changed:
            self._deadline = time.monotonic() + timeout_s
            self._closing.set()
            self._changed.notify()
        self._thread.join(timeout_s)
        lost = self._lost + len(self._waiting)
        if lost:
            log.warning("%d points or files of run %s did not reach MLflow at %s", lost, self.run_id, self.uri)
        return lost

    def finish(self, status: str) -> None:
        """Close and mark the run FINISHED, FAILED or KILLED. A server that is away is only warned about."""
        self.close(timeout_s=30)
        try:
            client(self.uri).set_terminated(self.run_id, status)
        except Exception as error:
            log.warning("run %s could not be marked %s: %s", self.run_id, status, _first_line(error))

    def _put(self, *items: Point | Upload) -> None:
        with self._changed:
            room = max(0, MOST_WAITING - len(self._waiting))
            self._waiting.extend(items[:room])
            self._lost += len(items[room:])
            self._changed.notify()

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _deliver_all(self) -> None:
        failing = False
        while (items := self._next()) and time.monotonic() < self._deadline:
            try:
                self._deliver(items)
            except Exception as error:
                if _is_final(error):
                    self._lost += len(items)
                    log.warning(
                        "MLflow refuses %s: %s",
                        items[0] if len(items) == 1 else f"{len(items)} points",
                        _first_line(error),
                    )
                else:
                    if not failing:
                        log.warning("MLflow at %s fails, points wait: %s", self.uri, _first_line(error))
                    failing = True
                    self._pause()
                    continue
            failing = False
            with self._changed:
                for _ in items:
                    self._waiting.popleft()

    def _next(self) -> list[Point | Upload]:
        """What to send in one call: points up to the next file, or that file; [] when closed and done."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
            points = list(itertools.islice(itertools.takewhile(_is_point, self._waiting), BATCH))
            return points or list(itertools.islice(self._waiting, 1))

    def _deliver(self, items: list[Point | Upload]) -> None:
        from mlflow.entities import Metric

        mlflow = client(self.uri)
        if isinstance(upload := items[0], Upload):
            mlflow.log_artifact(self.run_id, str(upload.local), upload.folder or None)
            return
        points = [point for point in items if isinstance(point, Point)]
        for key in {point.key for point in points} - self._held.keys():
            self._held[key] = {metric.step for metric in mlflow.get_metric_history(self.run_id, key)}
        new = {(p.key, p.step): p for p in reversed(points) if p.step not in self._held[p.key]}
        if new:
            metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in reversed(new.values())]
            mlflow.log_batch(self.run_id, metrics=metrics)
        for key, step in new:
            self._held[key].add(step)

    def _pause(self) -> None:
        """Wait before the next attempt; shorter while somebody waits for `close`."""
        if not self._closing.wait(RETRY_S):
            return
        time.sleep(min(0.5, max(0.0, self._deadline - time.monotonic())))


def _is_point(item: Point | Upload) -> bool:
    return isinstance(item, Point)


def _is_final(error: Exception) -> bool:
    """Whether offering the same again cannot help."""
    refusals = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE")
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", "") in refusals


def _experiment(mlflow: Any, name: str, artifacts: str | None) -> str:
    """Id of the experiment, made if need be; another process may make it at the same time."""
    from mlflow.exceptions import MlflowException

    found = mlflow.get_experiment_by_name(name)
    if found is None:
        try:
            return str(mlflow.create_experiment(name, artifact_location=artifacts))
        except MlflowException:
            found = mlflow.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def last_step(uri: str, run_id: str, key: str) -> int:
    """Step of the last point of a metric that the run holds; 0 where it holds none. Raises as MLflow does."""
    return max((metric.step for metric in client(uri).get_metric_history(run_id, key)), default=0)
