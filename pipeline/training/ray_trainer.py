"""Ray Train's trainer, except that a killed driver leaves no process on the cluster."""

from __future__ import annotations

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback


class Trainer(TorchTrainer):
    """Trains in a group of workers, without Ray Train's cleaner of placement groups.

    The cleaner is a detached process of 200 MB on the head. It never ends where the controller dies first: it calls
    `ray.actor.exit_actor` in a thread, which ends only the thread (Ray 2.60). Its work is done without it: Ray removes
    the placement groups of a driver that has died, and `release_placement_groups` those of a controller that has died.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]
