"""What this machine, or each node of the cluster, has of what a job needs, and what to do about what is missing.

Every check is bounded in time: what does not answer within it is a finding, not a wait.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from json import dumps, load
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pipeline.config.schema import DataSection
from pipeline.errors import EnvironmentFault

PATIENCE_S = 15.0
CLUSTER_PATIENCE_S = 90.0  # workers start on every node


@dataclass(frozen=True)
class Check:
    """One finding. `warn` is worth knowing, `fail` stops jobs; both come with a remedy."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def run(cluster: bool, json: bool) -> int:
    """Check and print, as a table or as JSON. Returns the exit code: 0, or 3 where something failed."""
    found = checks(cluster)
    if json:
        print(dumps([asdict(check) for check in found], indent=1))
    else:
        _print(found)
    return EnvironmentFault.exit_code if any(check.status == "fail" for check in found) else 0


def checks(cluster: bool = False) -> list[Check]:
    """Findings about this machine; with `cluster` about every node of the Ray cluster too."""
    found = _bounded({**_MACHINE, "Ray": _ray}, PATIENCE_S)
    if not cluster:
        return found
    connected: list[Check] = []
    nodes = _bounded({"nodes": lambda: _nodes(connected)}, CLUSTER_PATIENCE_S)
    return [*found, *connected, *nodes]


def _bounded(named: dict[str, Callable[[], Check]], patience_s: float) -> list[Check]:
    """All checks side by side, each in a thread that is left behind where it takes too long."""
    results: dict[str, Check] = {}

    def take(name: str, check: Callable[[], Check]) -> None:
        try:
            results[name] = replace(check(), name=name)
        except Exception as error:
            results[name] = Check(name, "fail", f"{type(error).__name__}: {error}", "see the message")

    threads = [threading.Thread(target=take, args=item, daemon=True) for item in named.items()]
    deadline = time.monotonic() + patience_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = "look for a network that swallows packets, or a machine that is overloaded"
    return [results.get(name, Check(name, "fail", f"no answer in {patience_s:.0f} s", late)) for name in named]


def _ok(found: str) -> Check:
    return Check("", "ok", found)


def _warn(found: str, remedy: str) -> Check:
    return Check("", "warn", found, remedy)


def _fail(found: str, remedy: str) -> Check:
    return Check("", "fail", found, remedy)


def _torch() -> Check:
    import torch

    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        listed = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
        bf16 = "with bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "without bf16"
        return _ok(f"{versions}, {listed}, {bf16}")
    if Path("/proc/driver/nvidia/version").exists():
        return _fail(
            f"{versions}: an NVIDIA driver is here, but torch cannot use it",
            "install the torch build of this driver's CUDA version; in a container, pass the GPUs in",
        )
    bf16 = "with bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without bf16: keep train.precision float32"
    return _ok(f"{versions}, {os.cpu_count()} CPU cores, no GPU, {bf16}")


def _threads() -> Check:
    given, cores = os.environ.get("OMP_NUM_THREADS"), os.cpu_count() or 1
    if given and given.isdigit() and int(given) > cores:
        return _warn(
            f"OMP_NUM_THREADS is {given} on {cores} cores", "unset it, or give processes fewer threads than cores"
        )
    allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("MALLOC_MMAP_THRESHOLD_") or "default"
    return _ok(f"OMP_NUM_THREADS {given or 'unset'}, allocator {allocator}; a job's workers get their own")


def _storage() -> Check:
    from pipeline.storage import files

    named = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN")
    if not any(os.environ.get(name) for name in named):
        return _ok("not configured: no AWS_* in the environment (paths work, and buckets through a machine's role)")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    try:
        buckets = files.list_names("s3://")
    except EnvironmentFault as fault:
        if "AccessDenied" in fault.message:
            return _warn(
                f"{endpoint} accepts the credentials, but not for listing buckets",
                "nothing, where the job's buckets are allowed: a job checks them before it starts",
            )
        return _fail(fault.message, fault.remedy)
    listed = ", ".join(buckets[:5]) + (", …" if len(buckets) > 5 else "")
    return _ok(f"{endpoint} accepts the credentials; buckets: {listed or 'none yet'}")


def _tracking() -> Check:
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db"
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()
        except urllib.error.HTTPError as error:
            return _warn(f"{uri} answers with {error.code}", "check MLFLOW_TRACKING_TOKEN, or USERNAME and PASSWORD")
        except OSError as error:
            return _fail(f"{uri} does not answer: {error}", "start the server, or correct MLFLOW_TRACKING_URI")
        return _ok(f"{uri} answers")
    if parts.scheme not in ("sqlite", "file", ""):
        return _warn(f"{uri} is not checked here", "a job checks it before it starts")
    place = Path(parts.path[1:] if parts.scheme == "sqlite" else parts.path)
    if not os.access(_existing(place), os.W_OK):
        return _fail(
            f"{uri}: {_existing(place)} is not writable", "set MLFLOW_TRACKING_URI to a server or a free place"
        )
    return _ok(uri if "MLFLOW_TRACKING_URI" in os.environ else f"{uri}, where a job runs (no MLFLOW_TRACKING_URI)")


def _disk() -> Check:
    cache = Path(DataSection.model_fields["cache"].default).expanduser()
    free = shutil.disk_usage(_existing(cache)).free / 1e9
    found = f"{free:.0f} GB free for {cache}"
    if not os.access(_existing(cache), os.W_OK):
        return _fail(f"{cache} cannot be written", "set data.cache to a folder on a disk of this node")
    if free < 2:
        return _fail(found, "free some space, or set data.cache to a folder on a larger disk")
    if free < 20:
        return _warn(found, "enough for small collections; set data.cache_gb below it, or data.cache to a larger disk")
    return _ok(found)


def _shared_memory() -> Check:
    if not Path("/dev/shm").exists():
        return _ok("no /dev/shm on this system; Ray uses a file")
    size = shutil.disk_usage("/dev/shm").total / 1e9
    if size < 1:
        return _warn(
            f"/dev/shm has {size:.2f} GB; Ray and NCCL want more",
            "docker run --shm-size=8g; on Kubernetes an emptyDir with medium: Memory at /dev/shm",
        )
    return _ok(f"/dev/shm has {size:.0f} GB")


def _inception() -> Check:
    from pipeline.evaluation.extractors import default_place
    from pipeline.evaluation.fidelity import published

    known = published("inception")
    assert known is not None
    assert known.digest is not None
    path = Path(default_place(known)).expanduser()
    get = (
        f"for jobs with `extractor: inception`, download {known.url} to {path} (evaluate.download: true does), or set "
        "evaluate.weights"
    )
    if not path.exists():
        return _warn(f"no {path}", get)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(known.digest):
        return _warn(f"{path} is not the published file: its SHA-256 begins with {digest[:8]}", get)
    return _ok(f"{path} is the published file")


def _ray() -> Check:
    ours = f"Ray {importlib.metadata.version('ray')}"
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    if address in ("", "local", "auto"):
        return _ok(f"{ours}; no cluster named (RAY_API_SERVER_ADDRESS, RAY_ADDRESS): `sagan run` starts one here")
    try:
        if not address.startswith("http"):
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
            return _ok(f"{ours}; the cluster at {address} answers")
        token = {"Authorization": f"Bearer {value}"} if (value := os.environ.get("RAY_AUTH_TOKEN")) else {}
        with urllib.request.urlopen(
            urllib.request.Request(f"{address}/api/version", headers=token), timeout=5
        ) as reply:
            theirs = f"Ray {load(reply)['ray_version']}"
    except urllib.error.HTTPError as error:
        return _fail(f"{ours}; {address} answers with {error.code}", "set RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN")
    except (OSError, ValueError) as error:
        return _fail(
            f"{ours}; no cluster answers at {address}: {error}",
            "start one (infra/README.md), or correct RAY_API_SERVER_ADDRESS or RAY_ADDRESS",
        )
    if theirs != ours:
        return _fail(f"{ours} here, {theirs} at {address}", f"install the cluster's version here, or {ours} there")
    return _ok(f"{ours}; the cluster at {address} answers")


def _nodes(findings: list[Check]) -> Check:
    """Every node's machine checks go to `findings`, those that are not ok; returns the sum."""
    if not os.environ.get("RAY_ADDRESS"):
        return _fail(
            "nodes are looked at from inside the cluster, and RAY_ADDRESS is not set",
            "ray job submit -- python -m pipeline doctor --cluster",
        )
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    alive = [node for node in ray.nodes() if node["Alive"]]
    look = ray.remote(num_cpus=0)(lambda: _bounded(_MACHINE, PATIENCE_S))
    answers = {
        node["NodeManagerAddress"]: look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in alive
    }
    for address, answer in answers.items():
        for check in ray.get(answer, timeout=CLUSTER_PATIENCE_S):
            if check.status != "ok":
                findings.append(replace(check, name=f"{address}: {check.name}"))
    resources = ray.cluster_resources()
    return _ok(
        f"{len(alive)} with {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs, each looked at"
    )


_MACHINE: dict[str, Callable[[], Check]] = {
    "Python and torch": _torch,
    "threads": _threads,
    "S3": _storage,
    "MLflow": _tracking,
    "disk": _disk,
    "shared memory": _shared_memory,
    "Inception weights": _inception,
}


def _existing(path: Path) -> Path:
    """The path or its nearest ancestor that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _print(found: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("", "", Column(overflow="fold"), box=None, pad_edge=False, show_header=False)
    for check in found:
        said = Text(check.found)
        if check.remedy:
            said.append(f"\n→ {check.remedy}", style="dim" if check.status == "warn" else "")
        table.add_row(Text(check.status, style=colours[check.status]), Text(check.name), said)
    Console().print(table)
