"""Checks of the cluster's resources, and waits for nodes that its autoscaler adds.

Ray would wait without a message for resources that do not exist.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.compute.cluster import leaving_nodes
from pipeline.errors import EnvironmentFault, counted
from pipeline.runs.json_records import Wait

_LOOK_S = 1.0  # seconds between two looks at the cluster
_END_ACTOR_S = 60.0  # limit for the end of an actor; a head that is restarted answers by then
_SILENT_S = 60.0  # an autoscaler that has not looked at a request by then does not run; it looks every few seconds


def require_resources(count: int, what: str, cpus: float, gpus: float, remedy: Callable[[int], str]) -> None:
    """Check that the nodes of the cluster can hold a number of processes. What is in use counts as room.

    Waits for nodes that the autoscaler of the cluster can add.

    Args:
        count: Number of processes.
        what: Name of the processes for the message.
        cpus: CPUs per process.
        gpus: GPUs per process.
        remedy: Returns what to do, given the number of processes that fit.

    Raises EnvironmentFault where the processes do not fit.
    """
    if not cpus and not gpus:
        return
    each = {"CPU": cpus, "GPU": gpus}
    wait_for_nodes([each] * count, lambda: count_fitting(node_resources(), each) >= count, f"{count} {what}")
    require_total(count, what, cpus, gpus, remedy)
    fit = count_fitting(node_resources(), each)
    if fit < count:
        raise EnvironmentFault(
            f"{count} {what} need {shown_amounts(cpus, gpus)} each; the nodes of the cluster hold {fit} of them",
            remedy(fit),
        )


def require_total(count: int, what: str, cpus: float, gpus: float, remedy: Callable[[int], str]) -> None:
    """Check that the cluster as a whole has enough CPUs and GPUs, for what may be spread over several nodes.

    The arguments are those of `require_resources`. Raises EnvironmentFault where it has fewer.
    """
    have = cluster_resources()
    for resource, each in (("CPU", cpus), ("GPU", gpus)):
        if count * each > have[resource]:
            raise EnvironmentFault(
                f"{count} {what} need {count * each:g} {resource}s; the cluster has {have[resource]:g}",
                remedy(int(have[resource] // each)),
            )


def wait_for_nodes(bundles: Sequence[Mapping[str, float]], there: Callable[[], bool], what: str) -> None:
    """Wait until the nodes of the cluster hold some processes, if its autoscaler can add the nodes that are missing.

    Returns at once where the nodes hold the processes, and where the cluster has no autoscaler of Ray's version 2.
    Returns also where the autoscaler says that its node types or their limits do not allow such nodes. Therefore the
    caller checks the cluster after the call. Ray keeps one request for nodes for the whole cluster, and this one
    replaces another. It is repeated where another one replaces it: an actor of Ray Train, which stays in the cluster,
    sends its own request every 20 s, and that is mostly empty.

    Args:
        bundles: Amounts that each process needs, by name ("CPU", "GPU"). A process fits on one node.
        there: Returns whether the nodes hold the processes.
        what: Name of the processes for the message.
    """
    if there() or not _has_autoscaler():
        return
    needed = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
    _request_nodes(needed)
    wait = Wait(who="the start", what=f"nodes for {what}", until="the autoscaler adds them", since_s=time.time())
    began = time.monotonic()
    try:
        asked, said = _cluster_status().cluster_resource_state.cluster_resource_state_version, False
        while not there():
            answer = None
            with suppress(Exception):  # the head does not answer, and Ray raises errors of many kinds then
                status = _cluster_status()
                if _requested(status) == Counter(frozenset(bundle.items()) for bundle in needed):
                    answer = status.autoscaling_state
                else:
                    _request_nodes(needed)
                    asked = status.cluster_resource_state.cluster_resource_state_version
            if answer is not None and answer.last_seen_cluster_resource_state_version > asked:
                if answer.infeasible_cluster_resource_constraints:
                    return
                if not said:
                    print(wait.line, flush=True)
                said = True
            elif not said and time.monotonic() - began > _SILENT_S:
                return
            time.sleep(_LOOK_S)
        if said:
            print(f"{wait.who} waited {time.monotonic() - began:.0f} s", flush=True)
    finally:
        _request_nodes([])


def _has_autoscaler() -> bool:
    """Return whether the cluster was started with an autoscaler of version 2."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    with suppress(Exception):  # a client of ray:// has no such connection
        return bool(is_autoscaler_v2())
    return False


def _request_nodes(bundles: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


def _cluster_status() -> Any:
    """Return the state of the cluster, and the answer of the autoscaler to an earlier state."""
    import ray
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    client = ray._private.worker.global_worker.gcs_client  # `ray.autoscaler.v2.sdk` opens a connection for each call
    return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=10))


def _requested(status: Any) -> Counter[frozenset[tuple[str, float]]]:
    """Return the request for nodes that the cluster has now: the number of processes by what each one needs."""
    bundles: Counter[frozenset[tuple[str, float]]] = Counter()
    for constraint in status.cluster_resource_state.cluster_resource_constraints:
        for row in constraint.resource_requests:
            bundles[frozenset(row.request.resources_bundle.items())] += row.count
    return bundles


def shown_amounts(cpus: float, gpus: float) -> str:
    """Return numbers of CPUs and GPUs for messages."""
    return f"{counted(cpus, 'CPU')} and {counted(gpus, 'GPU')}" if gpus else counted(cpus, "CPU")


def cluster_resources() -> dict[str, float]:
    """Return the numbers of CPUs and GPUs of the whole cluster, including those in use, by name ("CPU", "GPU")."""
    import ray

    have = ray.cluster_resources()
    return {resource: have.get(resource, 0.0) for resource in ("CPU", "GPU")}


def uses_gpu(device: Literal["auto", "cpu", "cuda"]) -> bool:
    """Return whether each worker of a job with `resources.device: device` gets a GPU.

    `auto` means: if the connected cluster has GPUs.
    """
    return cluster_resources()["GPU"] >= 1 if device == "auto" else device == "cuda"


def visible_gpus(count: float) -> dict[str, Any]:
    """Return Ray's options for a task or an actor that reserves `count` GPUs and sees no others.

    A process without GPUs would see all GPUs of its node: Ray leaves CUDA_VISIBLE_DEVICES alone there. torch would then
    page-lock memory and open a context on the first GPU, which takes memory from the worker that owns it.
    """
    if count or cluster_resources()["GPU"] == 0:
        return {"num_gpus": count}
    return {"num_gpus": 0, "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}


def node_resources() -> list[dict[str, float]]:
    """Return the CPUs and GPUs of each node, including those in use, by name ("CPU", "GPU")."""
    import ray

    return [_cpus_and_gpus(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def free_resources() -> list[dict[str, float]]:
    """Return the CPUs and GPUs that are free on each node, by name ("CPU", "GPU"). Nodes that drain have none."""
    import ray

    leaving = {node.node for node in leaving_nodes()}
    free = ray._private.state.available_resources_per_node()  # `ray.available_resources` returns the sum over nodes
    return [_cpus_and_gpus(have) for node, have in free.items() if node not in leaving]


def _cpus_and_gpus(have: Mapping[str, float]) -> dict[str, float]:
    return {resource: have.get(resource, 0.0) for resource in ("CPU", "GPU")}


def count_fitting(
    nodes: Sequence[Mapping[str, float]], each: Mapping[str, float], reserved: Sequence[Mapping[str, float]] = ()
) -> int:
    """Return how many processes that need `each` fit on nodes with these resources.

    Room is left for the processes that need `reserved`, where they fit at all.
    """
    left = [dict(node) for node in nodes]
    for needed in reserved:
        _take(left, needed)
    return sum(_times(node, each) for node in left)


def fits(
    nodes: Sequence[Mapping[str, float]],
    count: int,
    each: Mapping[str, float],
    beside: Sequence[Mapping[str, float]] = (),
) -> bool:
    """Return whether `count` processes that need `each` fit on the nodes together with the processes `beside`."""
    left = [dict(node) for node in nodes]
    return all(_take(left, needed) for needed in beside) and count_fitting(left, each) >= count


def _take(nodes: Sequence[dict[str, float]], needed: Mapping[str, float]) -> bool:
    """Take what a process needs from the first node that has it. Return whether there is one."""
    node = next((node for node in nodes if _times(node, needed) >= 1), None)
    if node is not None:
        node.update({resource: node[resource] - amount for resource, amount in needed.items()})
    return node is not None


def _times(have: Mapping[str, float], each: Mapping[str, float]) -> int:
    """Return how often a process that needs `each` fits into `have`. A process must need something."""
    return min(int(have[resource] / amount + 1e-6) for resource, amount in each.items() if amount)


@dataclass(frozen=True)
class PlacementGroups:
    """The placement groups that actors of this driver's job have made, for example for the workers of a run.

    Attributes:
        placed: Number of groups of living actors that hold their resources.
        waiting: Number of groups of living actors that wait for resources.
        orphaned: Ids of the groups whose actor has died.
    """

    placed: int
    waiting: int
    orphaned: Sequence[Any]


def placement_groups() -> PlacementGroups:
    """Return the placement groups of this driver's actors.

    Ray removes the placement group of an actor that has died only when the driver ends too.
    """
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    placed, waiting, orphaned = 0, 0, []
    # `ray.util.placement_group_table` leaves out who made a group.
    for data in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = Group.FromString(data)
        if group.creator_job_id != job or group.is_detached or group.state == Group.REMOVED:
            continue
        if not group.creator_actor_id or ray.ActorID(group.creator_actor_id).is_nil():  # made by the driver itself
            continue
        actor = ray._private.state.actors(group.creator_actor_id.hex())
        if actor.get("State", "DEAD") == "DEAD":  # Ray forgets actors that died long ago
            orphaned.append(ray.PlacementGroupID(group.placement_group_id))
        elif group.state == Group.CREATED:
            placed += 1
        else:
            waiting += 1
    return PlacementGroups(placed, waiting, orphaned)


def release_placement_groups(groups: PlacementGroups) -> None:
    """Remove the placement groups whose actor has died.

    Their CPUs would stay reserved until the driver ends. Ray Train's own cleaner is not used (`ray_trainer.py`).
    It does not know a group that waits for resources, either, and it can lose a race with the death of the actor
    (ray-project/ray issue 62753).
    """
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for identifier in groups.orphaned:
        remove_placement_group(PlacementGroup(identifier))


def end_actor(actor_id: str | None) -> None:
    """End an actor of this driver that does not answer, and remove its placement groups.

    Waits at most 60 seconds until the cluster's head knows that the actor is dead. An actor that the driver cannot
    reach may be alive, and would start its workers again. Where Ray's error has not said which actor it was, only the
    placement groups of actors that are dead are removed.
    """
    import ray

    until = time.monotonic() + _END_ACTOR_S
    while time.monotonic() < until:
        with suppress(Exception):  # the head does not answer, and Ray raises errors of many kinds then
            if actor_id is None or ray._private.state.actors(actor_id).get("State", "DEAD") == "DEAD":
                release_placement_groups(placement_groups())
                return
            core = ray._private.worker.global_worker.core_worker
            core.kill_actor(ray.ActorID.from_hex(actor_id), True)  # `ray.kill` without a handle
        time.sleep(_LOOK_S)
