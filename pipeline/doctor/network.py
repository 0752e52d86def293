"""Measures the network between the nodes of a cluster as training uses it: by all-reduces of torch."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from pipeline.compute.cluster import live_nodes, run_on_nodes, this_address
from pipeline.compute.resources import cluster_resources

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_BYTES = 2**26  # of the tensor that is reduced
_REPEATS = 3
_START_S = 90.0  # time limit of a node to start a process, which imports torch; seconds, or a minute on a cold disk
_LINK_S = 20.0  # time limit of a pair for opening its connections, and of each all-reduce


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
    # A node that cannot reach the store would make each of its partners wait for it.
    starts = run_on_nodes(dict.fromkeys(live_nodes(), partial(_start, host, store.port)), _START_S, gpus)
    absent = {name: error for name, error in starts.items() if isinstance(error, Exception)}
    found = []
    for number, together in enumerate(pairs):
        calls = {
            name: partial(all_reduce, host, store.port, f"{number}/{a}/{b}", rank, on_gpu=bool(gpus))
            for a, b in together
            for rank, name in enumerate((a, b))
            if a not in absent and b not in absent
        }
        seconds = absent | run_on_nodes(calls, _START_S + 2 * _LINK_S, gpus)
        found += [_link((a, b), [seconds[name] for name in (a, b) if name in seconds]) for a, b in together]
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


def all_reduce(host: str, port: int, pair: str, rank: int, *, on_gpu: bool, limit_s: float = _LINK_S) -> float:
    """Join a group of two ranks, and return the seconds of an all-reduce. It runs on a node.

    The other rank may start up to 90 s later. The limit begins when both are there.

    Args:
        host: address of the `TCPStore` at which the two ranks meet.
        port: its port.
        pair: name of the group.
        rank: 0 or 1.
        on_gpu: whether the tensor is on a GPU.
        limit_s: time limit for opening the connections, and for each all-reduce, in seconds.

    Raises RuntimeError where the other rank does not come, and where an all-reduce fails.
    """
    import torch
    import torch.distributed as dist

    if host.startswith("127."):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    store = dist.PrefixStore(pair, _connect(host, port))
    store.set(f"started/{rank}", "1")
    store.wait([f"started/{1 - rank}"], timedelta(seconds=_START_S))
    backend, device = ("nccl", "cuda") if on_gpu else ("gloo", "cpu")
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=limit_s))
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


def _start(host: str, port: int) -> None:
    """Import torch, and reach the store. It runs on a node."""
    _connect(host, port)


def _connect(host: str, port: int) -> TCPStore:
    from torch.distributed import TCPStore

    return TCPStore(host, port, None, is_master=False, timeout=timedelta(seconds=_LINK_S))
