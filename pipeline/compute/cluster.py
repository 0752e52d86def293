"""The connection to Ray: join a cluster, start Ray on this machine, run a function on nodes, see nodes leave."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.compute.root_cause import connection_error, root_cause
from pipeline.errors import EnvironmentFault
from pipeline.storage.filesystems import filesystem

T = TypeVar("T")

_ANSWER_S = 20.0  # longest wait for a connection to the head
_WATCH_S = 1.0  # seconds between two looks for nodes that leave


def connect(least_cpus: float = 1) -> None:
    """Join the cluster that RAY_ADDRESS names. Without RAY_ADDRESS, start Ray on this machine.

    A submitted job always has RAY_ADDRESS. A process that is connected already stays connected.

    Args:
        least_cpus: Least number of logical CPUs of a Ray that is started on this machine.

    Raises EnvironmentFault where the cluster cannot be reached.
    """
    import ray

    if ray.is_initialized():
        return
    # Ray Train polls its workers at this interval, and a report waits for the next poll. The default is 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    runtime_env = None if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else {"env_vars": _python_path()}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING, "runtime_env": runtime_env}
    try:
        if address := os.environ.get("RAY_ADDRESS"):
            require_answer(address, _ANSWER_S)
            ray.init(**options)
        else:
            # Listen on loopback, and not on every interface. Ray's own option for it is read when `ray` is imported.
            ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
            ray.init(num_cpus=max(os.cpu_count() or 1, int(-(-least_cpus // 1))), include_dashboard=False, **options)
    except Exception as error:  # Ray raises bare Exceptions, for example when a node is slow to start
        raise EnvironmentFault(
            f"the Ray cluster at {os.environ.get('RAY_ADDRESS', 'this machine')} cannot be reached: "
            f"{connection_error(error)}",
            "start a cluster with `ray start --head`, or unset RAY_ADDRESS to run on this machine alone",
        ) from None


def require_answer(address: str, timeout_s: float) -> None:
    """Connect to the head at HOST:PORT or ray://HOST:PORT, since Ray itself waits for minutes for a head that is gone.

    The addresses `auto` and `local` name no head and are not checked. Raises OSError where nothing answers within
    `timeout_s` seconds, and ValueError where the address has another form.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()


def join_named_cluster() -> bool:
    """Join the cluster that RAY_ADDRESS names. Return whether RAY_ADDRESS is set. Raises EnvironmentFault."""
    if not os.environ.get("RAY_ADDRESS"):
        return False
    connect()
    return True


def live_nodes() -> dict[str, str]:
    """Return the ids of the live nodes of the cluster by name.

    The name is the address, followed by the first digits of the id where nodes share an address.
    """
    import ray

    nodes = [(node["NodeManagerAddress"], node["NodeID"]) for node in ray.nodes() if node["Alive"]]
    addresses = Counter(address for address, _ in nodes)
    return {address if addresses[address] == 1 else f"{address} ({id_[:6]})": id_ for address, id_ in nodes}


def run_on_nodes(calls: Mapping[str, Callable[[], T]], timeout_s: float, gpus: float = 0) -> dict[str, T | Exception]:
    """Run a function on each of some nodes, all at once. Return the results by name of the node.

    Each call has a process of its own, because torch counts the process groups that a process has tried to make, and
    two processes with different counts do not meet. The result is an exception where the function raised one, where the
    node does not answer within `timeout_s` seconds, and where it has no `gpus` free GPUs.

    Args:
        calls: functions without arguments, by name of the node as in `live_nodes`.
        timeout_s: longest time to wait, in seconds.
        gpus: GPUs that each call reserves.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = live_nodes()
    pending = {}
    for name, function in calls.items():
        place = NodeAffinitySchedulingStrategy(nodes[name], soft=False)
        task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0, max_calls=1)(_call)  # Ray takes no partial
        pending[name] = task.options(scheduling_strategy=place).remote(function)
    ray.wait(list(pending.values()), num_returns=len(pending), timeout=timeout_s)
    results: dict[str, T | Exception] = {}
    for name, reference in pending.items():
        try:
            results[name] = ray.get(reference, timeout=0)
        except ray.exceptions.GetTimeoutError:
            ray.cancel(reference, force=True)
            results[name] = TimeoutError(f"no answer in {timeout_s:.0f} s")
        except Exception as error:
            results[name] = Exception(str(root_cause(error)))
    return results


def _call(function: Callable[[], T]) -> T:
    return function()


@dataclass(frozen=True)
class LeavingNode:
    """A node of the cluster that will be taken away."""

    node: str
    """Id of the node."""
    host: str
    seconds: float | None
    """Time until then, in seconds; None where the notice has no deadline."""


def leaving_nodes() -> list[LeavingNode]:
    """Return the live nodes that drain.

    A drain is the notice of a cloud, of an autoscaler, or of `ray start --block` that received SIGTERM.
    """
    import ray

    draining = ray._private.state.state.get_draining_nodes()  # Ray Train reads it there too; no public function has it
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]} if draining else {}
    return [
        LeavingNode(node, hosts[node], max(0.0, deadline_ms / 1000 - time.time()) if deadline_ms else None)
        for node, deadline_ms in draining.items()
        if node in hosts
    ]


class NodeWatch:
    """A thread that asks Ray which nodes drain, since the driver must not wait for an answer."""

    def __init__(self) -> None:
        self.leaving: Sequence[LeavingNode] = ()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="nodes", daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(_WATCH_S):
            with suppress(Exception):  # the head does not answer, and Ray raises errors of many kinds then
                self.leaving = leaving_nodes()


def this_node() -> str:
    """Return the id of the node on which this process runs."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def this_address() -> str:
    """Return the address of the node on which this process runs."""
    import ray.util

    return str(ray.util.get_node_ip_address())


def ray_storage(root: str) -> tuple[Any, str]:
    """Return the pyarrow file system and the path of a URL, for Ray.

    Ray's S3 client is not used, because it creates directory objects, which break other clients.
    """
    import pyarrow.fs

    found, path = filesystem(root)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(found)), path


def _python_path() -> dict[str, str]:
    """Return a PYTHONPATH with which workers import the driver's code, whether it is installed or not."""
    checkout = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": os.pathsep.join([checkout, *filter(None, [os.environ.get("PYTHONPATH")])])}
