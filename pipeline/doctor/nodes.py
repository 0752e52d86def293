"""Checks every node of the Ray cluster, compares the nodes, and measures the network between them."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from pipeline.compute.cluster import connect, live_nodes, run_on_nodes
from pipeline.compute.resources import cluster_resources
from pipeline.config.schema import DataSection
from pipeline.doctor import machine
from pipeline.doctor.check import Check, bounded, fail, ok, warn
from pipeline.doctor.network import Link, measure_links
from pipeline.errors import counted

GPU = "kind of GPU"
PATIENCE_S = 90.0  # time limit of what runs on the nodes: starting a worker, and the checks
CLOCK_PATIENCE_S = 10.0
NODE_PATIENCE_S = 15.0  # time limit of a check on a node
NETWORK_PATIENCE_S = 600.0
_PACKAGES = ("torch", "ray", "numpy", "webdataset", "fsspec", "s3fs", "mlflow-skinny")
_CLOCK_S = 1.0  # difference of clocks that is reported
_LEAST_OPEN_FILES = 4096
_WRITTEN = 2**25  # bytes that measure the speed of a disk
_SLOW = 0.5  # share of the median below which a speed is reported


@dataclass(frozen=True)
class NodeFacts:
    """What a node says about itself.

    Attributes:
        checks: results of the checks of a machine.
        same: what must be the same on all nodes, by name.
        disk_mb_s: speed of writing to the disk of the cache, with fsync, in megabytes per second.
        open_files: number of files that a process may open.
    """

    checks: list[Check]
    same: dict[str, str]
    disk_mb_s: float
    open_files: int


def checks() -> list[Check]:
    """Return what is wrong on the nodes and between them, and a summary. Every check has a time limit."""
    problems: list[Check] = []
    summary = bounded({"nodes": lambda: _nodes(problems)}, 3 * PATIENCE_S)
    network = bounded({"network": lambda: _network(problems)}, NETWORK_PATIENCE_S) if summary[0].status == "ok" else []
    return [*problems, *summary, *network]


def _nodes(problems: list[Check]) -> Check:
    """Ask every node for facts, and append what is wrong to `problems`. Return a summary."""
    if not os.environ.get("RAY_ADDRESS"):
        return fail(
            "RAY_ADDRESS is not set; nodes are checked from inside the cluster",
            "run: ray job submit -- python -m pipeline doctor --cluster",
        )
    connect()
    everywhere = live_nodes()
    run_on_nodes(dict.fromkeys(everywhere, time.time), PATIENCE_S)  # starts processes, so that clocks are read at once
    began = time.time()
    clocks = run_on_nodes(dict.fromkeys(everywhere, time.time), CLOCK_PATIENCE_S)
    took = time.time() - began
    offsets = {node: now - began - took / 2 for node, now in clocks.items() if isinstance(now, float)}
    problems += odd_clocks(offsets, took / 2)
    answers = run_on_nodes(dict.fromkeys(everywhere, node_facts), PATIENCE_S)
    facts = {node: answer for node, answer in answers.items() if isinstance(answer, NodeFacts)}
    for node, answer in answers.items():
        found = answer.checks if isinstance(answer, NodeFacts) else [_silent(answer)]
        problems += [replace(check, name=f"{node}: {check.name}") for check in found if check.status != "ok"]
    problems += odd_nodes(facts)
    have = cluster_resources()
    cpus, gpus = counted(have["CPU"], "CPU"), counted(have["GPU"], "GPU")
    return ok(f"checked {counted(len(facts), 'node')} with {cpus} and {gpus}")


def _silent(error: Exception) -> Check:
    remedy = "look at the node: its processes, its memory and its log in /tmp/ray; leave it out until it answers"
    return replace(fail(f"the node could not be checked: {error}", remedy), name="node")


def node_facts() -> NodeFacts:
    """Return the facts about the node on which this process runs."""
    import torch

    gpus = torch.cuda.device_count()
    same = {
        "code": _code(),
        "Python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "NVIDIA driver": _driver(),
        GPU: torch.cuda.get_device_name() if gpus else "none",
    }
    return NodeFacts(
        checks=bounded(machine.CHECKS, NODE_PATIENCE_S),
        same=same,
        disk_mb_s=_disk_speed(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    )


def odd_nodes(facts: Mapping[str, NodeFacts]) -> list[Check]:
    """Return the differences between nodes: other code or versions than most, slow disks, low limits."""
    found = []
    for name in next(iter(facts.values())).same if facts else ():
        values = {node: of_node.same[name] for node, of_node in facts.items()}
        usual, count = Counter(values.values()).most_common(1)[0]
        for node, value in values.items():
            if value != usual:
                seen = f"{name} is {value} on this node, and {usual} on {count} of {len(values)} nodes"
                odd = (
                    warn(seen, "training is as fast as the slowest node; leave out nodes of another kind")
                    if name == GPU
                    else fail(seen, "use one image, or install the same code and constraints.txt on every node")
                )
                found.append(replace(odd, name=f"{node}: {name}"))
    median = statistics.median(of_node.disk_mb_s for of_node in facts.values()) if facts else 0.0
    for node, of_node in facts.items():
        if of_node.disk_mb_s < _SLOW * median:
            slow = warn(
                f"the disk of the cache takes {of_node.disk_mb_s:.0f} MB/s; the median node's takes {median:.0f} MB/s",
                "set data.cache to a folder on a local disk, and look at what else uses the disk",
            )
            found.append(replace(slow, name=f"{node}: disk speed"))
        if of_node.open_files < _LEAST_OPEN_FILES:
            few = warn(
                f"a process may open {of_node.open_files} files; Ray needs many",
                f"raise the limit to 65536 (`ulimit -n`, LimitNOFILE of the service); {_LEAST_OPEN_FILES} is the least",
            )
            found.append(replace(few, name=f"{node}: open files"))
    return found


def odd_clocks(offsets_s: Mapping[str, float], uncertain_s: float) -> list[Check]:
    """Return the nodes whose clock differs from the head's by more than a second.

    Args:
        offsets_s: time of each node's clock minus the time here, in seconds.
        uncertain_s: largest error of the offsets, in seconds.
    """
    return [
        replace(
            warn(
                f"the clock differs from the clock here by {offset:+.1f} s",
                "synchronise the clocks of all nodes (chrony, systemd-timesyncd)",
            ),
            name=f"{node}: clock",
        )
        for node, offset in offsets_s.items()
        if abs(offset) > _CLOCK_S + uncertain_s
    ]


def odd_links(links: list[Link]) -> list[Check]:
    """Return the pairs of nodes that cannot exchange gradients, or do so much more slowly than the median pair."""
    found = [
        replace(
            fail(
                f"an all-reduce between the two nodes failed: {link.error}",
                "let the nodes of the cluster reach each other on every port; the variables GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME choose the network interface",
            ),
            name=f"{link.nodes[0]} and {link.nodes[1]}",
        )
        for link in links
        if link.error
    ]
    speeds = [link.gb_s for link in links if not link.error]
    median = statistics.median(speeds) if speeds else 0.0
    return found + [
        replace(
            warn(
                f"an all-reduce between the two nodes moves {link.gb_s:.2f} GB/s; the median is {median:.2f} GB/s",
                "look at the network between the two nodes, and at what else uses it",
            ),
            name=f"{link.nodes[0]} and {link.nodes[1]}",
        )
        for link in links
        if not link.error and link.gb_s < _SLOW * median
    ]


def _network(problems: list[Check]) -> Check:
    """Measure an all-reduce between all pairs of nodes. Append what is wrong to `problems`; return a summary."""
    links = measure_links()
    problems += odd_links(links)
    speeds = sorted(link.gb_s for link in links if not link.error)
    if not links:
        return ok("one node; no network to measure")
    if not speeds:
        return fail("no pair of nodes could run an all-reduce", "see the pairs above")
    return ok(
        f"an all-reduce between two nodes moves {speeds[0]:.2f} to {speeds[-1]:.2f} GB/s "
        f"({len(speeds)} of {len(links)} pairs)"
    )


def _code() -> str:
    """Return the first digits of the SHA-256 of the source files of both packages."""
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for package in ("pipeline", "sagan"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _driver() -> str:
    """Return the version of the NVIDIA driver, or `none`."""
    file = Path("/sys/module/nvidia/version")
    return file.read_text().strip() if file.exists() else "none"


def _disk_speed() -> float:
    """Return the speed of writing to the disk of the cache, in megabytes per second."""
    cache = machine.existing(Path(DataSection.model_fields["cache"].default).expanduser())
    block = os.urandom(_WRITTEN)
    with tempfile.TemporaryFile(dir=cache) as file:
        began = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _WRITTEN / 1e6 / (time.perf_counter() - began)
