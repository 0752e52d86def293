"""Write the dashboards of `infra/monitoring/dashboards` from the tables of panels: `python -m infra.monitoring`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.monitoring.panels import CLUSTER, RUN, Panel

FOLDER = Path(__file__).parent / "dashboards"
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_COLUMNS, _WIDTH, _HEIGHT = 2, 12, 8


def dashboards() -> dict[str, dict[str, Any]]:
    """Return the dashboards by file name, in Grafana's JSON model."""
    runs = {
        "name": "run",
        "label": "run",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": "label_values(ray_sagan_images, run)", "refId": "runs"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
    }
    return {
        "run.json": _dashboard("sagan: a run", "sagan-run", RUN, [runs]),
        "cluster.json": _dashboard("sagan: the cluster", "sagan-cluster", CLUSTER, []),
    }


def _dashboard(title: str, uid: str, panels: Sequence[Panel], variables: list[dict[str, Any]]) -> dict[str, Any]:
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return {
        "title": title,
        "uid": uid,
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source, *variables]},
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, _COLUMNS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [{"refId": "A", "expr": panel.query, "legendFormat": panel.legend, "datasource": _SOURCE}],
    }


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, dashboard in dashboards().items():
        (FOLDER / name).write_text(json.dumps(dashboard, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
