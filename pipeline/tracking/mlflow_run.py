"""An MLflow run that receives metrics and files in the background, so that training never waits for MLflow."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shlex
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from pipeline.config.locations import absolute_tracking_uri, sqlite_database
from pipeline.config.schema import TrainJob
from pipeline.errors import EnvironmentFault, LastingFault, UsageError, shown_url, without_secrets_of
from pipeline.storage import files

log = logging.getLogger(__name__)

BATCH = 1000  # MLflow accepts at most this many metrics in one call
MOST_WAITING = 200_000  # points and files that may wait in memory during an outage
RETRY_S = 5.0  # seconds between two attempts during an outage
_PLAIN_IN_PATHS = " !\"$&'()*+,-./:;<=>@[\\]^_`{|}~"  # printable ASCII without `#`, `%` and `?`
PARENT_RUN = "mlflow.parentRunId"


class Point(NamedTuple):
    """One value of one metric. `step` is the position in images, `time_ms` the Unix time in milliseconds."""

    key: str
    value: float
    step: int
    time_ms: int


class Upload(NamedTuple):
    """A local file for the folder `folder` of the run's artifacts."""

    local: Path
    folder: str


def default_uri() -> str:
    """Return MLFLOW_TRACKING_URI, or without it the URI of `runs/mlflow.db`. Paths are below the current directory."""
    return absolute_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db")


def tracking_uri(job: TrainJob) -> str:
    """Return `track.uri` of the job, or `default_uri()` where the job has none."""
    return job.track.uri or default_uri()


def artifact_location(job: TrainJob) -> str | None:
    """Return the artifact location of a new experiment; None where the MLflow server decides it.

    A tracking database has no artifact store, so artifacts go to `<checkpoint.root>/mlflow` by default.
    """
    default = files.join(job.checkpoint.root, "mlflow") if sqlite_database(job.track.uri or "") else None
    return job.track.artifacts or default


def client(uri: str) -> Any:
    """Return an MlflowClient that stops waiting for a silent server after seconds instead of minutes.

    Raises UsageError where a `?` in the path of an SQLite URI would begin parameters.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", str(sys.stderr.isatty()))
    from mlflow import MlflowClient

    if database := sqlite_database(uri):
        _, mark, parameters = uri.partition("?")
        if mark and "=" not in parameters:
            raise UsageError(
                f"the tracking URI {uri.replace('?', '%3F')} has a question mark, which begins parameters",
                "write %3F for a question mark in the path of an SQLite URI, and %25 for a per cent sign",
            )
        database.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def check_tracker(uri: str) -> None:
    """Ask MLflow for an experiment, as a job does at its start. Raises EnvironmentFault where MLflow cannot be used."""
    try:
        client(uri).search_experiments(max_results=1)
    except mlflow_errors() as error:
        raise _unusable(uri, error) from error


def mlflow_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions with which MLflow reports that a server, a database or S3 cannot be used."""
    from alembic.util.exc import CommandError
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, OSError, SQLAlchemyError, CommandError, Boto3Error, BotoCoreError, ClientError


def refuses_user(error: Exception) -> bool:
    """Return whether an exception of MLflow says that the user is not known (401) or may not do this (403).

    The text of the exception does not tell: the port of a server or the id of a run may contain the same digits.
    """
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() in (401, 403)
    response = getattr(error, "response", None)  # of requests, which MLflow leaves to its callers for artifacts
    return getattr(response, "status_code", None) in (401, 403)


def _unusable(uri: str, error: Exception) -> EnvironmentFault:
    """Return the EnvironmentFault that describes an exception of MLflow, with its remedy.

    It is a LastingFault where a person must correct the cause.
    """
    text, shown = str(error), shown_url(uri)
    upgrade = f"mlflow db upgrade {shlex.quote(shown)}"
    if "out-of-date database schema" in text:
        remedy = f"stop all programs that use the database, then run: {upgrade}"
    elif "DatabaseError" in text or "no such" in text or "locate revision" in text:
        remedy = f"this is no database of this version of MLflow: try {upgrade}, or give another file"
    elif "filesystem tracking backend" in text:
        remedy = "use a database: set track.uri or MLFLOW_TRACKING_URI to sqlite:///FILE or to a server"
    elif "Invalid Host" in text:
        remedy = "start the server with `mlflow server --allowed-hosts HOST:PORT`, or use a host name that it allows"
    elif refuses_user(error):
        remedy = "check MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    else:
        remedy = (
            "start the server (mlflow server …), or correct track.uri or MLFLOW_TRACKING_URI; track.uri=sqlite:///FILE "
            "needs no server"
        )
        return EnvironmentFault(f"MLflow at {shown} cannot be used: {first_line(error, uri)}", remedy)
    return LastingFault(f"MLflow at {shown} cannot be used: {first_line(error, uri)}", remedy)


class Tag(NamedTuple):
    """A tag of the run."""

    key: str
    value: str


class MlflowRun:
    """Sends metrics, tags, pictures and files to one MLflow run. A thread sends them in the order of the calls.

    `log`, `tag` and `log_file` return at once and never raise. A point is not sent if the run already has a point with
    the same key and step, so a resumed run may log all its points again. If the server does not respond, the thread
    repeats the call until `close` reaches its time-out. One warning is logged per outage.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        """Continue the existing run `run_id`."""
        self.uri, self.run_id = uri, run_id
        self._waiting: deque[Point | Upload | Tag] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._deadline = math.inf
        self._lost = 0
        self._known_steps: dict[str, set[int]] = {}  # key → steps that the run has
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
    ) -> MlflowRun:
        """Create a run, or resume the run `run_id`, and set its params and tags.

        Where the run `run_id` does not exist or is deleted, a new run is created, and a message says so.

        Args:
            uri: Tracking URI.
            experiment: Name of the experiment. It is created where it does not exist.
            run_name: Name of a new run.
            run_id: Id of the run to resume; None creates a run.
            params: Params by key. A param that the run already has keeps its value.
            tags: Tags by key.
            artifacts: Artifact location of a new experiment; None for the default of the server.
            parent: Id of the parent run.

        Raises EnvironmentFault where MLflow cannot be reached or refuses a call.
        """
        from mlflow.entities import Param, RunTag

        try:
            mlflow = client(uri)
            if run_id is None or not _can_resume(mlflow, run_id, uri):
                experiment_id = _experiment(mlflow, experiment, artifacts)
                run_id = str(mlflow.create_run(experiment_id, run_name=run_name).info.run_id)
            else:
                mlflow.update_run(run_id, status="RUNNING")
            existing = mlflow.get_run(run_id).data.params
            new = [Param(key, str(value)) for key, value in params.items() if key not in existing]
            all_tags = {**tags, **({PARENT_RUN: parent} if parent else {})}
            for i in range(0, max(len(new), 1), 100):  # MLflow accepts at most 100 params in one call
                mlflow.log_batch(run_id, params=new[i : i + 100], tags=[RunTag(k, str(v)) for k, v in all_tags.items()])
        except mlflow_errors() as error:
            raise _unusable(uri, error) from error
        return cls(uri, run_id)

    def log(self, metrics: dict[str, float], step: int, time_ms: int) -> None:
        """Log one point per metric.

        Args:
            metrics: Values by key.
            step: Position in images.
            time_ms: Unix time of the points in milliseconds.
        """
        self._put(*(Point(key, float(value), step, time_ms) for key, value in metrics.items()))

    def replay(self, lines: str) -> None:
        """Log every point of a `metrics.jsonl`."""
        for line in lines.splitlines():
            point = json.loads(line)
            self.log(point["metrics"], point["step"], point["time_ms"])

    def log_file(self, local: Path, folder: str = "") -> None:
        """Upload a file into the folder `folder` of the run's artifacts. The thread reads the file later."""
        self._put(Upload(local, folder))

    def tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self._put(Tag(key, value))

    def close(self, timeout_s: float) -> int:
        """Send the waiting points and files and end the thread.

        Args:
            timeout_s: Longest time to wait, in seconds.

        Returns the number of points, tags and files of the run that did not reach the server.
        """
        with self._changed:
            self._deadline = time.monotonic() + timeout_s
            self._closing.set()
            self._changed.notify()
        self._thread.join(timeout_s)
        lost = self._lost + len(self._waiting)
        if lost:
            log.warning(
                "%d points, tags and files of run %s did not reach MLflow at %s", lost, self.run_id, shown_url(self.uri)
            )
        return lost

    def finish(self, status: str) -> None:
        """Close, and set the status of the run to FINISHED, FAILED or KILLED.

        A server that cannot be reached causes a warning and no exception.
        """
        self.close(timeout_s=30)
        try:
            client(self.uri).set_terminated(self.run_id, status)
        except Exception as error:
            log.warning(
                "the status of run %s could not be set to %s: %s", self.run_id, status, first_line(error, self.uri)
            )

    def _put(self, *items: Point | Upload | Tag) -> None:
        """Append the items to the queue. Items beyond MOST_WAITING are dropped and counted as lost."""
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
                        "MLflow refused %s, which is dropped: %s",
                        items[0] if len(items) == 1 else f"{len(items)} points",
                        first_line(error, self.uri),
                    )
                else:
                    if not failing:
                        log.warning(
                            "MLflow at %s fails; points wait in memory and are sent again: %s",
                            shown_url(self.uri),
                            first_line(error, self.uri),
                        )
                    failing = True
                    self._pause()
                    continue
            failing = False
            with self._changed:
                for _ in items:
                    self._waiting.popleft()

    def _next(self) -> list[Point | Upload | Tag]:
        """Wait for items and return those of the next call: the points before the next file or tag, or one of these.

        Returns [] when the queue is empty and the run is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
            points = list(itertools.islice(itertools.takewhile(_is_point, self._waiting), BATCH))
            return points or list(itertools.islice(self._waiting, 1))

    def _deliver(self, items: list[Point | Upload | Tag]) -> None:
        """Send the items in one call. Raises the exceptions of MLflow."""
        from mlflow.entities import Metric

        mlflow = client(self.uri)
        match items[0]:
            case Upload(local, folder):
                mlflow.log_artifact(self.run_id, str(local), folder or None)
                return
            case Tag(key, value):
                mlflow.set_tag(self.run_id, key, value)
                return
        points = [point for point in items if isinstance(point, Point)]
        for key in {point.key for point in points} - self._known_steps.keys():
            self._known_steps[key] = {metric.step for metric in mlflow.get_metric_history(self.run_id, key)}
        new = {(p.key, p.step): p for p in reversed(points) if p.step not in self._known_steps[p.key]}
        if new:
            metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in reversed(new.values())]
            mlflow.log_batch(self.run_id, metrics=metrics)
        for key, step in new:
            self._known_steps[key].add(step)

    def _pause(self) -> None:
        """Wait before the next attempt. The wait is shorter while `close` waits for the thread."""
        if not self._closing.wait(RETRY_S):
            return
        time.sleep(min(0.5, max(0.0, self._deadline - time.monotonic())))


def _is_point(item: Point | Upload | Tag) -> bool:
    return isinstance(item, Point)


def _is_final(error: Exception) -> bool:
    """Return whether a repeated call would fail with the same error."""
    refusals = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE")
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", "") in refusals


def _can_resume(mlflow: Any, run_id: str, uri: str) -> bool:
    """Return whether a run exists and is not deleted. Where it is not so, print why a new run begins."""
    from mlflow.exceptions import MlflowException

    try:
        if mlflow.get_run(run_id).info.lifecycle_stage == "active":
            return True
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        problem = f"MLflow at {uri} has no run {run_id}"
        remedy = "if the run is in another tracker, stop, and set track.uri or MLFLOW_TRACKING_URI to that tracker"
    else:
        problem = f"run {run_id} is deleted in MLflow at {uri}"
        remedy = f"to have the deleted run beside it, run: mlflow runs restore --run-id {run_id}"
    print(f"{problem}: a new MLflow run begins, with the metrics of the newest checkpoint; {remedy}", flush=True)
    return False


def _experiment(mlflow: Any, name: str, artifacts: str | None) -> str:
    """Return the id of the experiment, which is created where it does not exist.

    Raises LastingFault where the experiment is deleted.
    """
    from mlflow.exceptions import MlflowException

    experiment = mlflow.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(mlflow.create_experiment(name, artifact_location=artifacts and _artifact_uri(artifacts)))
        except MlflowException:  # another process may have created it in the meantime
            experiment = mlflow.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise LastingFault(
            f"the MLflow experiment {name} is deleted",
            f"run: mlflow experiments restore --experiment-id {experiment.experiment_id}; or choose another name with "
            "track.experiment=NAME",
        )
    return str(experiment.experiment_id)


def _artifact_uri(location: str) -> str:
    """Return a URL as it is, and a path with escapes. MLflow decodes a path like a URI, and cuts it at `?` and `#`."""
    is_uri = "://" in location or location.startswith("file:")
    return location if is_uri else quote(location, safe=_PLAIN_IN_PATHS)


def first_line(error: BaseException, uri: str) -> str:
    """Return the first line of a message of MLflow, without the secrets of the tracking URI."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return shown_url(without_secrets_of(uri, line))[:300]


def last_step(uri: str, run_id: str, key: str) -> int:
    """Return the largest step of the run's points of metric `key`; 0 where the run has no such point.

    Raises EnvironmentFault where MLflow cannot be used.
    """
    try:
        return max((metric.step for metric in client(uri).get_metric_history(run_id, key)), default=0)
    except mlflow_errors() as error:
        raise _unusable(uri, error) from error
