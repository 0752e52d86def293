"""Gauges of a training run. Ray exports them to Prometheus on every node, and their names there begin with `ray_`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GaugeKind:
    """A gauge.

    Attributes:
        text: The value and its unit.
        labels: Names of the labels besides `run`, the name of the run.
    """

    text: str
    labels: tuple[str, ...] = ()


GAUGES = {
    "sagan_images": GaugeKind("Position of the run in images."),
    "sagan_target_images": GaugeKind("Position at which the run ends, in images."),
    "sagan_images_per_second": GaugeKind("Speed of training at the last log."),
    "sagan_metric": GaugeKind(
        "Metric of the last log: losses, norms of gradients, shares of time, singular values and gammas.", ("metric",)
    ),
    "sagan_score": GaugeKind("Last score.", ("metric",)),
    "sagan_scores_since_best": GaugeKind("Number of scores after the best score of this driver."),
    "sagan_checkpoint_images": GaugeKind("Position of the newest checkpoint in images."),
    "sagan_checkpoint_interval_images": GaugeKind("Images between two checkpoints."),
    "sagan_restarts": GaugeKind("Number of restarts of the workers, over all drivers."),
    "sagan_images_lost": GaugeKind("Images that were trained on again after a failure."),
    "sagan_device_hours": GaugeKind("Device hours that the run has held, over all drivers."),
    "sagan_workers": GaugeKind("Number of workers in the present group; 0 while none trains."),
    "sagan_waiting_since_seconds": GaugeKind("Unix time since which a part waits; 0 while it does not.", ("who",)),
    "sagan_rank_step_seconds": GaugeKind("Time that a rank works in a step.", ("rank", "process")),
}
"""All gauges by name."""


class RunGauges:
    """The gauges of one run.

    Args:
        run: name of the run.
    """

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._run = run
        self._gauges = {
            name: Gauge(name, description=kind.text, tag_keys=("run", *kind.labels)) for name, kind in GAUGES.items()
        }

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge of `GAUGES`. The call does not wait. Ray takes ASCII only, so other characters are escaped."""
        ascii_labels = {key: text.encode("ascii", "backslashreplace").decode() for key, text in labels.items()}
        self._gauges[name].set(float(value), {"run": self._run, **ascii_labels})
