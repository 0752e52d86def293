"""Measures the network between the nodes of a cluster as training uses it: by all-reduces of torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from pipeline.compute.cluster import live_nodes, run_on_nodes, this_address
from pipeline.compute.resources import cluster_resources

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store, TCPStore

_BYTES = 2**26  # of the tensor that is reduced
_REPEATS = 3
_START_S = 90.0  # time limit of a node to start a process, which imports torch; seconds, or a minute on a cold disk
_LINK_S = 45.0  # time limit of a pair for opening its connections, and of each all-reduce
_PARTNERS = 3  # number of partners with which a node is tried if it reaches none of them


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
    # A node that fails alone would make each of its partners wait for it.
    alone = partial(all_reduce_alone, host, store.port, on_gpu=bool(gpus))
    starts = run_on_nodes(dict.fromkeys(live_nodes(), alone), _START_S + _LINK_S, gpus)
    absent = {name: error for name, error in starts.items() if isinstance(error, Exception)}
    found: list[Link] = []
    tried: list[Link] = []
    for number, together in enumerate(pairs):
        left_out = absent | given_up(tried)
        calls = {
            name: partial(all_reduce, host, store.port, f"{number}/{a}/{b}", rank, on_gpu=bool(gpus))
            for a, b in together
            for rank, name in enumerate((a, b))
            if a not in left_out and b not in left_out
        }
        seconds = left_out | run_on_nodes(calls, _START_S + 2 * _LINK_S, gpus)
        links = [_link((a, b), [seconds[name] for name in (a, b) if name in seconds]) for a, b in together]
        found += links
        tried += [link for link in links if not left_out.keys() & set(link.nodes)]
    return found


def given_up(tried: Sequence[Link]) -> dict[str, Exception]:
    """Return the nodes that have reached none of three partners, with an error that names these.

    Such a node is not tried with others, since each of them would wait for it.
    """
    partners: dict[str, list[str]] = {}
    for a, b in (link.nodes for link in tried):
        partners.setdefault(a, []).append(b)
        partners.setdefault(b, []).append(a)
    reached = {name for link in tried if not link.error for name in link.nodes}
    return {
        name: Exception(f"{name} failed with each of {', '.join(others)}, and was not tried with other nodes")
        for name, others in partners.items()
        if name not in reached and len(others) >= _PARTNERS
    }


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


def all_reduce_alone(host: str, port: int, *, on_gpu: bool) -> None:
    """Reach the `TCPStore` at HOST:PORT, and run an all-reduce in a group of one rank. It runs on a node.

    Raises RuntimeError where the node cannot run an all-reduce with any partner, for example because its network
    interface does not exist.
    """
    from torch.distributed import HashStore

    _connect(host, port)
    with _group(host, HashStore(), 0, 1, on_gpu, _LINK_S) as tensor:
        _reduce(tensor)


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
    from torch.distributed import PrefixStore

    store = PrefixStore(pair, _connect(host, port))
    store.set(f"started/{rank}", "1")
    store.wait([f"started/{1 - rank}"], timedelta(seconds=_START_S))
    with _group(host, store, rank, 2, on_gpu, limit_s) as tensor:
        _reduce(tensor)  # opens the connections
        began = time.perf_counter()
        for _ in range(_REPEATS):
            _reduce(tensor)
        return (time.perf_counter() - began) / _REPEATS


@contextmanager
def _group(host: str, store: Store, rank: int, size: int, on_gpu: bool, limit_s: float) -> Iterator[Tensor]:
    """Make the default process group, and yield the tensor that it reduces."""
    import torch
    import torch.distributed as dist

    if host.startswith("127."):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    backend, device = ("nccl", "cuda") if on_gpu else ("gloo", "cpu")
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=limit_s))
    try:
        yield torch.ones(_BYTES // 4, device=device)
    finally:
        dist.destroy_process_group()


def _reduce(tensor: Tensor) -> None:
    import torch.distributed as dist

    dist.all_reduce(tensor)
    tensor[0].item()  # waits for the device


def _connect(host: str, port: int) -> TCPStore:
    from torch.distributed import TCPStore

    return TCPStore(host, port, None, is_master=False, timeout=timedelta(seconds=_LINK_S))
