"""Dashboards and alerts name metrics that exist, and every alert fires when it should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.dashboard.modules.reporter import reporter_agent

from infra.monitoring.__main__ import FOLDER, dashboards
from infra.monitoring.panels import CLUSTER, RUN
from pipeline.training.status.run_gauges import GAUGES

ALERTS = FOLDER.parent / "alerts.yaml"
SERIES = Path(__file__).parent / "alerts_test.yaml"


def rules() -> list[dict[str, str]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, str]] = group["rules"]
    return found


def test_every_query_names_a_metric_that_exists() -> None:
    known = {f"ray_{name}" for name in [*GAUGES, *reporter_agent.METRICS_GAUGES]}
    for query in [panel.query for panel in (*RUN, *CLUSTER)] + [rule["expr"] for rule in rules()]:
        named = re.findall(r"ray_\w+", query)
        assert named, query
        assert set(named) <= known, query


def test_every_gauge_is_on_the_dashboard_of_a_run() -> None:
    shown = {name for panel in RUN for name in re.findall(r"ray_(\w+)", panel.query)}
    assert shown == set(GAUGES)


def test_every_label_of_a_legend_is_in_the_answer() -> None:
    for panel in RUN:
        kept = {name for labels in re.findall(r"by \(([^)]*)\)", panel.query) for name in labels.split(", ")}
        assert set(re.findall(r"{{(\w+)}}", panel.legend)) <= kept, panel.title


def test_the_dashboards_are_those_of_the_table() -> None:
    """`python -m infra.monitoring` writes them again."""
    assert {path.name: json.loads(path.read_text()) for path in FOLDER.iterdir()} == dashboards()


def test_every_alert_has_series_on_which_it_fires_and_is_documented() -> None:
    cases = [case for test in yaml.safe_load(SERIES.read_text())["tests"] for case in test["alert_rule_test"]]
    fired = {case["alertname"] for case in cases if case["exp_alerts"]}
    silent = {case["alertname"] for case in cases if not case["exp_alerts"]}
    names = {rule["alert"] for rule in rules()}
    assert fired == silent == names
    documented = set(re.findall(r"^\| `(\w+)` \|", (FOLDER.parents[1] / "README.md").read_text(), re.MULTILINE))
    assert names <= documented


@pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool (Debian's `prometheus`) is not installed: alerts not run"
)
def test_the_alerts_fire_on_these_series_and_on_no_others() -> None:
    done = subprocess.run(["promtool", "test", "rules", str(SERIES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
