"""Real servers and real images for every test that asks.

Servers are those of `infra.local`, started when first asked for, once per process, and ended with it. Tests that start
Ray carry `xdist_group("ray")`, so that one process of `make test` has them all and its cluster is the only one. Other
tests are grouped by folder (unit tests) or module (all others): one process makes what they share.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from infra.local.servers import S3, MlflowServer, Ray
from tests.progress_timeout import pytest_fixture_setup, pytest_timeout_cancel_timer, pytest_timeout_set_timer

__all__ = ["pytest_fixture_setup", "pytest_timeout_cancel_timer", "pytest_timeout_set_timer"]

os.environ["OMP_NUM_THREADS"] = "1"  # for programs that tests start: several processes share the cores


# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared machine")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a pytest with which pytest-xdist 3.8 silently groups no tests: every process would start Ray."""
    if config.getoption("dist", default="no") == "loadgroup" and pytest.version_tuple >= (9, 2):
        raise pytest.UsageError(
            f"pytest-xdist groups no tests with pytest {pytest.__version__}: install the versions of constraints.txt"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Group the tests for the processes of `make test`. Those with Ray begin first, because they take longest."""
    if config.getoption("loadgroup", default=False):
        items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
        for item in items:
            if item.get_closest_marker("xdist_group") is None:
                place = item.nodeid.partition("::")[0].split("/")[:3]  # tests/unit/FOLDER or tests/OTHER/MODULE
                item.add_marker(pytest.mark.xdist_group("/".join(place)))


class TestS3(S3):
    __test__ = False

    def bucket(self, name: str | None = None) -> str:
        """A fresh bucket's URL."""
        return super().bucket(name or f"test-{uuid.uuid4().hex[:8]}")


def pytest_sessionstart(session: pytest.Session) -> None:
    if terminal := session.config.pluginmanager.get_plugin("terminalreporter"):
        session.config.pluginmanager.register(_FailuresAtOnce(terminal))


class _FailuresAtOnce:
    """Shows a failure when it happens. pytest shows it after all tests, which can be an hour later."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.write_line(f"\n{report.nodeid} ({report.when}):\n{report.longreprtext}")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestS3]:
    """A real S3 server; this process's environment names it from the first use on."""
    with TestS3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def mlflow_server(s3: TestS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A real MLflow server whose artifacts are in a bucket. Clients take `.uri`.

    This process's environment has its login from the first use on; the tracking URI is left alone.
    """
    with (
        MlflowServer(tmp_path_factory.mktemp("mlflow"), artifacts=f"{s3.bucket()}/mlflow") as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patch.setenv(name, server.env[name])
        yield server


@pytest.fixture(scope="session")
def ray_cluster(s3: TestS3) -> Iterator[Ray]:
    """A Ray head of 4 logical CPUs whose jobs reach `s3`; give `.env` to a driver started as a process."""
    with Ray(env=s3.env) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def test_data() -> Path | None:
    """Folder of real collections, or None: then a test uses scikit-learn's digits, and says so."""
    folder = os.environ.get("SAGAN_TEST_DATA")
    return Path(folder) if folder else None
