"""Checks of the cluster's resources. Ray would wait without a message for resources that do not exist."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.errors import EnvironmentFault


def require_resources(count: int, what: str, cpus: float, gpus: float, remedy: Callable[[int], str]) -> None:
    """Check that the cluster has enough CPUs and GPUs for a number of processes.

    Args:
        count: Number of processes.
        what: Name of the processes for the message.
        cpus: CPUs per process.
        gpus: GPUs per process.
        remedy: Returns what to do, given the number of processes that fit.

    Raises EnvironmentFault where the processes do not fit.
    """
    have = cluster_resources()
    for resource, each in (("CPU", cpus), ("GPU", gpus)):
        if count * each > have[resource]:
            raise EnvironmentFault(
                f"{count} {what} need {count * each:g} {resource}s; the cluster has {have[resource]:g}",
                remedy(int(have[resource] // each)),
            )


def has_resources(cpus: float, gpus: float) -> bool:
    """Return whether the whole cluster has at least `cpus` CPUs and `gpus` GPUs. An amount of 0 always fits."""
    have = cluster_resources()
    return all(amount <= have[resource] for resource, amount in (("CPU", cpus), ("GPU", gpus)) if amount)


def cluster_resources() -> dict[str, float]:
    """Return the numbers of CPUs and GPUs of the whole cluster, including those in use, by name ("CPU", "GPU")."""
    import ray

    have = ray.cluster_resources()
    return {resource: have.get(resource, 0.0) for resource in ("CPU", "GPU")}


def release_placement_groups() -> None:
    """Remove the placement groups that stopped trials of this driver have left.

    Call this function when no run of this driver is active. Ray Train removes the placement groups of a controller that
    is killed. Its cleaner can lose a race, however (ray-project/ray issue 62753), and the CPUs then stay reserved.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    for identifier, facts in placement_group_table().items():
        # The id of a placement group ends with the id of its job.
        if identifier.endswith(job) and facts["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identifier))))
