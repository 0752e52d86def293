"""Checks whether this machine, or each node of the cluster, has what a job needs. Each problem has a remedy.

Every check has a time limit. A check that does not end within its limit fails.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from json import dumps, load
from pathlib import Path
from typing import Literal

from pipeline.compute.cluster import require_answer
from pipeline.config.locations import sqlite_database
from pipeline.config.schema import DataSection
from pipeline.errors import EnvironmentFault, printable, shown_url

PATIENCE_S = 15.0  # time limit of a check
CLUSTER_PATIENCE_S = 90.0  # time limit of the cluster check, which starts a worker on every node


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: Name of the check.
        status: `fail` means that jobs cannot run. `warn` means that some jobs may not run or may run worse.
        found: What the check found.
        remedy: What to do; "" where the status is `ok`.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        for name in ("found", "remedy"):
            object.__setattr__(self, name, printable(shown_url(getattr(self, name))))


def run(cluster: bool, json: bool) -> int:
    """Run the checks and print the results as a table or as JSON. Return the exit code: 0, or 3 if a check failed."""
    found = checks(cluster)
    if json:
        print(dumps([asdict(check) for check in found], indent=1))
    else:
        _print(found)
    return EnvironmentFault.exit_code if any(check.status == "fail" for check in found) else 0


def checks(cluster: bool = False) -> list[Check]:
    """Return the results for this machine. With `cluster`, add the results for every node of the Ray cluster."""
    found = _bounded({**_MACHINE, "Ray": _ray}, PATIENCE_S)
    if not cluster:
        return found
    problems: list[Check] = []
    nodes = _bounded({"nodes": lambda: _nodes(problems)}, CLUSTER_PATIENCE_S)
    return [*found, *problems, *nodes]


def _bounded(named: dict[str, Callable[[], Check]], patience_s: float) -> list[Check]:
    """Run all checks in parallel, each in a thread. A thread that takes longer than `patience_s` is abandoned."""
    results: dict[str, Check] = {}

    def take(name: str, check: Callable[[], Check]) -> None:
        try:
            results[name] = replace(check(), name=name)
        except Exception as error:
            results[name] = Check(
                name, "fail", f"{type(error).__name__}: {error}", "correct the cause that the message names"
            )

    threads = [threading.Thread(target=take, args=item, daemon=True) for item in named.items()]
    deadline = time.monotonic() + patience_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = "check whether a firewall drops packets, and whether the machine is overloaded"
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
            f"{versions}; this machine has an NVIDIA driver, but torch cannot use it",
            "install the torch build for the CUDA version of this driver; give a container access to the GPUs",
        )
    bf16 = "with bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no bf16: use train.precision=float32"
    return _ok(f"{versions}, {os.cpu_count()} CPU cores, no GPU, {bf16}")


def _threads() -> Check:
    threads, cores = os.environ.get("OMP_NUM_THREADS"), os.cpu_count() or 1
    if threads and threads.isdigit() and int(threads) > cores:
        return _warn(
            f"OMP_NUM_THREADS is {threads}, but this machine has {cores} cores",
            f"unset OMP_NUM_THREADS, or set it to at most {cores}",
        )
    allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("MALLOC_MMAP_THRESHOLD_") or "default"
    return _ok(f"OMP_NUM_THREADS {threads or 'unset'}, allocator {allocator}; a job sets both for its workers")


def _storage() -> Check:
    from pipeline.storage import files

    named = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN")
    if not any(os.environ.get(name) for name in named):
        return _ok("no AWS_* variables are set; paths work, and buckets work if the machine has a role")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    try:
        buckets = files.list_names("s3://")
    except EnvironmentFault as fault:
        if "AccessDenied" in fault.message:
            return _warn(
                f"{endpoint} accepts the credentials, but does not allow them to list buckets",
                "make sure that the credentials allow the job's buckets; a job checks them before it starts",
            )
        return _fail(fault.message, fault.remedy)
    listed = ", ".join(buckets[:5]) + (", …" if len(buckets) > 5 else "")
    return _ok(f"{endpoint} accepts the credentials; buckets: {listed or 'none yet'}")


def _tracking() -> Check:
    from pipeline.tracking.mlflow_run import check_tracker, default_uri

    uri = default_uri()
    shown = shown_url(uri)
    named = shown if "MLFLOW_TRACKING_URI" in os.environ else f"{shown}, because MLFLOW_TRACKING_URI is not set"
    database = sqlite_database(uri)
    if database and not database.exists():  # a job creates it
        if not os.access(_existing(database), os.W_OK):
            return _fail(
                f"{shown}: {_existing(database)} is not writable",
                "set MLFLOW_TRACKING_URI to a server, or to a file in a folder that is writable",
            )
        return _ok(f"{named}; the first job creates it")
    try:
        check_tracker(uri)
    except EnvironmentFault as fault:
        return _fail(fault.message, fault.remedy)
    return _ok(f"{named} answers")


def _disk() -> Check:
    cache = Path(DataSection.model_fields["cache"].default).expanduser()
    free = shutil.disk_usage(_existing(cache)).free / 1e9
    found = f"{free:.0f} GB free for {cache}"
    if not os.access(_existing(cache), os.W_OK):
        return _fail(f"{cache} is not writable", "set data.cache to a writable folder on a disk of this node")
    if free < 2:
        return _fail(found, "free some space, or set data.cache to a folder on a larger disk")
    if free < 20:
        return _warn(
            found,
            "this is enough for a small collection; for a large one, set data.cache to a folder on a larger disk, or "
            "set data.cache_gb below the free space",
        )
    return _ok(found)


def _shared_memory() -> Check:
    if not Path("/dev/shm").exists():
        return _ok("this system has no /dev/shm; Ray uses a file")
    size = shutil.disk_usage("/dev/shm").total / 1e9
    if size < 1:
        return _warn(
            f"/dev/shm has {size:.2f} GB; Ray and NCCL need more",
            "use docker run --shm-size=8g; on Kubernetes, mount an emptyDir with medium: Memory at /dev/shm",
        )
    return _ok(f"/dev/shm has {size:.0f} GB")


def _inception() -> Check:
    from pipeline.evaluation.extractors.published_networks import published
    from pipeline.evaluation.extractors.published_weights import default_place

    known = published("inception")
    assert known is not None
    assert known.digest is not None
    path = Path(default_place(known)).expanduser()
    remedy = (
        f"for jobs with `extractor: inception`, set evaluate.download=true, or download {known.url} to {path}, or set "
        "evaluate.extractor_weights"
    )
    if not path.exists():
        return _warn(f"{path} does not exist", remedy)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(known.digest):
        return _warn(f"{path} is not the published file: its SHA-256 begins with {digest[:8]}", remedy)
    return _ok(f"{path} is the published file")


def _ray() -> Check:
    local = f"Ray {importlib.metadata.version('ray')}"
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    if address in ("", "local", "auto"):
        return _ok(f"{local}; RAY_API_SERVER_ADDRESS and RAY_ADDRESS name no cluster: `sagan run` starts Ray here")
    try:
        if not address.startswith("http"):
            require_answer(address, timeout_s=5)
            return _ok(f"{local}; the cluster at {address} answers")
        token = {"Authorization": f"Bearer {value}"} if (value := os.environ.get("RAY_AUTH_TOKEN")) else {}
        request = urllib.request.Request(f"{address}/api/version", headers=token)  # noqa: S310 - it begins with http
        with urllib.request.urlopen(request, timeout=5) as reply:  # noqa: S310
            remote = f"Ray {load(reply)['ray_version']}"
    except urllib.error.HTTPError as error:
        return _fail(
            f"{local}; {address} answers with HTTP status {error.code}",
            "set RAY_AUTH_MODE=token, and set RAY_AUTH_TOKEN to the token of the cluster",
        )
    except (OSError, ValueError) as error:
        return _fail(
            f"{local}; no cluster answers at {address}: {error}",
            "start a cluster (see infra/README.md), or correct RAY_API_SERVER_ADDRESS or RAY_ADDRESS",
        )
    if remote != local:
        return _fail(
            f"{local} on this machine, but {remote} at {address}",
            f"install {remote} on this machine, or {local} on the cluster",
        )
    return _ok(f"{local}; the cluster at {address} answers")


def _nodes(findings: list[Check]) -> Check:
    """Run the machine checks on every node. Append results that are not ok to `findings`; return a summary."""
    if not os.environ.get("RAY_ADDRESS"):
        return _fail(
            "RAY_ADDRESS is not set; nodes are checked from inside the cluster",
            "run: ray job submit -- python -m pipeline doctor --cluster",
        )
    from pipeline.compute.cluster import connect, run_on_each_node
    from pipeline.compute.resources import cluster_resources

    connect()
    answers = run_on_each_node(lambda: _bounded(_MACHINE, PATIENCE_S), CLUSTER_PATIENCE_S)
    for address, checks in answers.items():
        findings += [replace(check, name=f"{address}: {check.name}") for check in checks if check.status != "ok"]
    have = cluster_resources()
    return _ok(f"checked {len(answers)} nodes with {have['CPU']:g} CPUs and {have['GPU']:g} GPUs")


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
    """Return the path, or its nearest ancestor that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _print(found: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("", "", Column(overflow="fold"), box=None, pad_edge=False, show_header=False)
    for check in found:
        text = Text(check.found)
        if check.remedy:
            text.append(f"\n→ {check.remedy}", style="dim" if check.status == "warn" else "")
        table.add_row(Text(check.status, style=colours[check.status]), Text(check.name), text)
    Console().print(table)
