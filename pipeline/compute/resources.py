"""Checks of the cluster's resources. Ray would wait without a message for resources that do not exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pipeline.compute.cluster import leaving_nodes
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


def free_resources() -> list[dict[str, float]]:
    """Return the CPUs and GPUs that are free on each node, by name ("CPU", "GPU"). Nodes that drain have none."""
    import ray

    leaving = {node.node for node in leaving_nodes()}
    free = ray._private.state.available_resources_per_node()  # `ray.available_resources` returns the sum over nodes
    return [
        {resource: have.get(resource, 0.0) for resource in ("CPU", "GPU")}
        for node, have in free.items()
        if node not in leaving
    ]


def count_fitting(
    free: Sequence[Mapping[str, float]], each: Mapping[str, float], reserved: Sequence[Mapping[str, float]] = ()
) -> int:
    """Return how many processes that need `each` fit on nodes with `free` resources.

    Room is left for the processes that need `reserved`, where they fit at all.
    """
    nodes = [dict(node) for node in free]
    for needed in reserved:
        node = next((node for node in nodes if _times(node, needed) >= 1), None)
        if node is not None:
            node.update({resource: node[resource] - amount for resource, amount in needed.items()})
    return sum(_times(node, each) for node in nodes)


def _times(have: Mapping[str, float], each: Mapping[str, float]) -> int:
    """Return how often a process that needs `each` fits into `have`. A process must need something."""
    return min(int(have[resource] / amount + 1e-6) for resource, amount in each.items() if amount)


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
