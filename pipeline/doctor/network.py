"""Measures the network between the nodes of a cluster as training uses it: by all-reduces of torch."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from pipeline.compute.cluster import live_nodes, run_on_nodes, this_address
from pipeline.compute.resources import cluster_resources

_BYTES = 2**26  # of the tensor that is reduced
_REPEATS = 3
_LINK_S = 20.0  # time limit of a pair, twice: for the meeting of the two ends, and for the call as a whole


@dataclass(frozen=True)
class Link:
    """An all-reduce between two nodes.

    Attributes:
        nodes: names of the two nodes.
        gb_s: bytes of the tensor divided by the time of an all-reduce, in gigabytes per second.
        error: why there was none; "" where there was.
    """

    nodes: tuple[str, str]
    gb_s: float = 0.0
    error: str = ""


def measure_links() -> list[Link]:
    """Run an all-reduce between all pairs of nodes of the connected cluster, each node in one pair at a time.

    The tensors are on GPUs where the cluster has them, and each end of a pair reserves one. Raises nothing: a pair that
    fails is a `Link` with an error.
    """
    from torch.distributed import TCPStore

    pairs = rounds(list(live_nodes()))
    if not pairs:
        return []
    host = this_address()
    store = TCPStore(host, 0, None, is_master=True, wait_for_workers=False)
    gpus = 1 if cluster_resources()["GPU"] else 0
    found = []
    for number, together in enumerate(pairs):
        calls = {
            name: partial(_all_reduce, host, store.port, f"{number}/{a}/{b}", rank, bool(gpus))
            for a, b in together
            for rank, name in enumerate((a, b))
        }
        seconds = run_on_nodes(calls, 2 * _LINK_S, gpus)
        found += [_link((a, b), [seconds[a], seconds[b]]) for a, b in together]
    return found


def rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Return all pairs of nodes in rounds, so that a node is in at most one pair of a round (the circle method)."""
    ring: list[str | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    found = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def _link(nodes: tuple[str, str], seconds: list[float | Exception]) -> Link:
    errors = [str(value) for value in seconds if isinstance(value, Exception)]
    if errors:
        return Link(nodes, error=errors[0])
    return Link(nodes, _BYTES / 1e9 / max(value for value in seconds if isinstance(value, float)))


def _all_reduce(host: str, port: int, name: str, rank: int, on_gpu: bool) -> float:
    """Join the group `name` of two, and return the seconds of an all-reduce. It runs on a node."""
    import torch
    import torch.distributed as dist

    if host.startswith("127."):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    limit = timedelta(seconds=_LINK_S)
    store = dist.PrefixStore(name, dist.TCPStore(host, port, None, is_master=False, timeout=limit))
    backend, device = ("nccl", "cuda") if on_gpu else ("gloo", "cpu")
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=limit)
    try:
        tensor = torch.ones(_BYTES // 4, device=device)
        dist.all_reduce(tensor)  # opens the connections
        tensor[0].item()  # waits for the device
        began = time.perf_counter()
        for _ in range(_REPEATS):
            dist.all_reduce(tensor)
        tensor[0].item()
        return (time.perf_counter() - began) / _REPEATS
    finally:
        dist.destroy_process_group()
