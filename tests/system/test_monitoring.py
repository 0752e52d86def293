"""Ray exports the gauges of a run, and every panel of the run's dashboard has data in Prometheus."""

from __future__ import annotations

import json
import os
import shutil
import signal
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra.local.server_process import Server
from infra.local.servers import Ray
from infra.monitoring.panels import RUN
from pipeline.training.status.run_gauges import GAUGES
from tests.progress_timeout import progress_seen
from tests.system.command_process import Driver, training_workers

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]

SOMETIMES = {"sagan_waiting_since_seconds"}  # only where a part waited
ENDLESS: dict[str, Any] = {"train.kimg": 1000, "checkpoint.kimg": 0.64, "evaluate.kimg": 0.64, "train.log_kimg": 0.32}


class Prometheus(Server):
    """Prometheus that reads the nodes of Ray every second."""

    name = "Prometheus"

    def __init__(self, listed: Path) -> None:
        super().__init__()
        self.listed = listed

    def command(self) -> list[str]:
        configuration = self.scratch / "prometheus.yaml"
        scrape = {"job_name": "ray", "scrape_interval": "1s", "file_sd_configs": [{"files": [str(self.listed)]}]}
        configuration.write_text(json.dumps({"scrape_configs": [scrape]}))
        address = f"--web.listen-address=127.0.0.1:{self.port}"
        return ["prometheus", f"--config.file={configuration}", f"--storage.tsdb.path={self.scratch}/data", address]

    def ready(self) -> bool:
        return "Server is ready to receive web requests" in self.log.read_text(errors="replace")

    def answer(self, query: str) -> list[object]:
        """The series of the answer to a query."""
        url = f"http://127.0.0.1:{self.port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(url) as response:
            result: list[object] = json.load(response)["data"]["result"]
        return result


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


def test_every_panel_has_data_of_a_run_with_a_kill(tmp_path: Path) -> None:
    with Ray(cpus=4) as cluster:
        listed = discovery(cluster)
        environment = {
            **cluster.env,
            "SAGAN_BUCKET": str(tmp_path),
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db",
        }
        run = Driver(tmp_path, environment, name="watched", **{**ENDLESS, "train.max_failures": -1})
        run.until("score at")
        os.kill(training_workers(cluster.env["RAY_ADDRESS"])[0], signal.SIGKILL)
        run.until("resumed from")
        run.until("score at")
        while not set(GAUGES) - SOMETIMES <= exported(listed):  # Ray exports every few seconds
            run.until("checkpoint")
        if shutil.which("prometheus"):
            with Prometheus(listed) as prometheus:
                for panel in RUN:
                    query = panel.query.replace("$run", "watched")
                    while not any(name in query for name in SOMETIMES) and not prometheus.answer(query):
                        run.until("checkpoint")
                    progress_seen()
        run.signal(signal.SIGTERM)
        assert run.end() == 130
    if not shutil.which("prometheus"):
        pytest.skip("the gauges are exported; Prometheus (Debian's `prometheus`) is not installed: no query was run")
