"""Ray exports the gauges of a run. In Prometheus, every panel has data, and the alerts fire that should."""

from __future__ import annotations

import json
import os
import shutil
import signal
import urllib.parse
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra.local.server_process import Server
from infra.local.servers import Ray
from infra.monitoring.panels import CLUSTER, RUN
from pipeline.training.status.run_gauges import GAUGES
from tests.document_blocks import ROOT
from tests.progress_timeout import progress_seen
from tests.system.command_process import Driver, training_workers

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]

SOMETIMES = {"sagan_waiting_since_seconds"}  # only where a part waited
ENDLESS: dict[str, Any] = {"train.kimg": 1000, "checkpoint.kimg": 0.64, "evaluate.kimg": 0.64, "train.log_kimg": 0.32}


class Prometheus(Server):
    """Prometheus that reads the nodes of Ray and evaluates the alerts every second."""

    name = "Prometheus"

    def __init__(self, listed: Path) -> None:
        super().__init__()
        self.listed = listed

    def command(self) -> list[str]:
        configuration = self.scratch / "prometheus.yaml"
        scrape = {"job_name": "ray", "scrape_interval": "1s", "file_sd_configs": [{"files": [str(self.listed)]}]}
        values = {
            "global": {"evaluation_interval": "1s"},
            "rule_files": [str(ROOT / "infra" / "monitoring" / "alerts.yaml")],
            "scrape_configs": [scrape],
        }
        configuration.write_text(json.dumps(values))
        address = f"--web.listen-address=127.0.0.1:{self.port}"
        return ["prometheus", f"--config.file={configuration}", f"--storage.tsdb.path={self.scratch}/data", address]

    def ready(self) -> bool:
        return "Server is ready to receive web requests" in self.log.read_text(errors="replace")

    def answer(self, query: str) -> list[dict[str, Any]]:
        """The series of the answer to a query."""
        url = f"http://127.0.0.1:{self.port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(url) as response:
            result: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return result

    def firing(self) -> set[str]:
        """The names of the alerts that fire, but for that of the disk: how full it is, is not the run's."""
        series = self.answer('ALERTS{alertstate="firing", alertname!="DiskIsFull"}')
        return {one["metric"]["alertname"] for one in series}


def discovery(cluster: Ray) -> Path:
    """The file in which a head lists what Prometheus reads."""
    return next(cluster.scratch.rglob("prom_metrics_service_discovery.json"))


def exported(listed: Path) -> set[str]:
    """Names of the gauges that have a value for the run."""
    families: list[Any] = []
    for target in [target for group in json.loads(listed.read_text()) for target in group["targets"]]:
        with urllib.request.urlopen(f"http://{target}/metrics") as response:
            families += text_string_to_metric_families(response.read().decode())
    return {
        family.name.removeprefix("ray_")
        for family in families
        for sample in family.samples
        if sample.labels.get("run") == "watched"
    }


def test_every_panel_has_data_of_a_run_with_kills_and_the_alert_of_the_kills_fires(tmp_path: Path) -> None:
    with Ray(cpus=4) as cluster, ExitStack() as stack:
        listed = discovery(cluster)
        prometheus = stack.enter_context(Prometheus(listed)) if shutil.which("prometheus") else None
        environment = {
            **cluster.env,
            "SAGAN_BUCKET": str(tmp_path),
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db",
        }
        run = Driver(tmp_path, environment, name="watched", **{**ENDLESS, "train.max_failures": -1})
        run.until("score at")
        while prometheus and not prometheus.answer('ray_sagan_restarts{run="watched"} == 0'):
            run.until("checkpoint")
        assert not prometheus or not prometheus.firing(), "a run that nothing has happened to"
        for _ in range(4):
            os.kill(training_workers(cluster.env["RAY_ADDRESS"])[0], signal.SIGKILL)
            run.until("resumed from")
            run.until("checkpoint")  # three failures at one position would end the run
        run.until("score at")
        while not set(GAUGES) - SOMETIMES <= exported(listed):  # Ray exports every few seconds
            run.until("checkpoint")
        if prometheus:
            queries = [panel.query.replace("$run", "watched") for panel in RUN]
            queries += [panel.query for panel in CLUSTER if "GPU" not in panel.title]
            for query in queries:
                while not any(name in query for name in SOMETIMES) and not prometheus.answer(query):
                    run.until("checkpoint")
                progress_seen()
            while "WorkersRestartOften" not in prometheus.firing():
                run.until("checkpoint")
            # Scores of so short a run may be worse than an earlier one.
            assert prometheus.firing() - {"ScoreGetsWorse"} == {"WorkersRestartOften"}
        run.signal(signal.SIGTERM)
        assert run.end() == 130
    if not shutil.which("prometheus"):
        pytest.skip("the gauges are exported; Prometheus (Debian's `prometheus`) is not installed: no query was run")
