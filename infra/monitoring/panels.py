"""The panels of the two dashboards. Every query names gauges of `training.status.run_gauges` or metrics of Ray."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A panel of a dashboard.

    Attributes:
        title: What the panel shows.
        query: PromQL. `$run` is the run, or several runs, that the reader chooses.
        unit: Grafana's name of the unit.
        legend: Labels that name a line.
    """

    title: str
    query: str
    unit: str = "short"
    legend: str = "{{run}}"


def _gauge(name: str, *labels: str, where: str = "") -> str:
    """Return a query for a gauge. A driver that ended and its successor both have a value for a while, hence `max`."""
    return f'max by ({", ".join(("run", *labels))}) (ray_{name}{{run=~"$run"{where}}})'


def _metric(pattern: str) -> str:
    """Return a query for the metrics of the log whose names match."""
    return _gauge("sagan_metric", "metric", where=f', metric=~"{pattern}"')


_METRIC = "{{run}} {{metric}}"
_WAITS = _gauge("sagan_waiting_since_seconds", "who")

RUN = (
    Panel("Position, % of the run", f"100 * {_gauge('sagan_images')} / {_gauge('sagan_target_images')}", "percent"),
    Panel("Images/s", _gauge("sagan_images_per_second")),
    Panel("Score", _gauge("sagan_score", "metric"), legend=_METRIC),
    Panel("Scores after the best one", _gauge("sagan_scores_since_best")),
    Panel("Losses", _metric("loss_.*"), legend=_METRIC),
    Panel("Logits", _metric("logit_.*"), legend=_METRIC),
    Panel("Norms of gradients", _metric("gradient_.*"), legend=_METRIC),
    Panel("Largest σ, and γ", _metric("(sigma|gamma)_.*"), legend=_METRIC),
    Panel("Shares of time", _metric(".*_share"), "percentunit", legend=_METRIC),
    Panel(
        "Images since the newest checkpoint, in intervals",
        f"({_gauge('sagan_images')} - {_gauge('sagan_checkpoint_images')}) / "
        f"{_gauge('sagan_checkpoint_interval_images')}",
    ),
    Panel("Workers", _gauge("sagan_workers")),
    Panel("Device hours", _gauge("sagan_device_hours")),
    Panel(
        "Time that a rank works in a step",
        _gauge("sagan_rank_step_seconds", "rank", "process"),
        "s",
        legend="rank {{rank}} {{process}}",
    ),
    Panel("Restarts", _gauge("sagan_restarts")),
    Panel("Images lost", _gauge("sagan_images_lost")),
    Panel("Waits for", f"(time() - {_WAITS}) * ({_WAITS} > bool 0)", "s", legend="{{run}} {{who}}"),
)
"""Panels of the dashboard of a run."""

CLUSTER = (
    Panel("Images/s of each run", "max by (run) (ray_sagan_images_per_second)"),
    Panel("Workers of each run", "max by (run) (ray_sagan_workers)"),
    Panel("CPU of each node, %", "ray_node_cpu_utilization", "percent", legend="{{ip}}"),
    Panel("Memory of each node", "ray_node_mem_used", "bytes", legend="{{ip}}"),
    Panel("Disk of each node, %", "ray_node_disk_utilization_percentage", "percent", legend="{{ip}}"),
    Panel("Received by each node", "ray_node_network_receive_speed", "Bps", legend="{{ip}}"),
    Panel("GPUs of each node, %", "ray_node_gpus_utilization", "percent", legend="{{ip}} {{GpuIndex}}"),
    Panel("Memory of GPUs", "ray_node_gram_used * 1e6", "bytes", legend="{{ip}} {{GpuIndex}}"),
)
"""Panels of the dashboard of a cluster."""
