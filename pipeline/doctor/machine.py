"""Checks whether this machine has what a job needs."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.config.locations import sqlite_database
from pipeline.config.schema import DataSection
from pipeline.doctor.check import Check, fail, ok, warn
from pipeline.errors import EnvironmentFault, shown_url


def _torch() -> Check:
    import torch

    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        listed = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
        bf16 = "with bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "without bf16"
        return ok(f"{versions}, {listed}, {bf16}")
    if Path("/proc/driver/nvidia/version").exists():
        return fail(
            f"{versions}; this machine has an NVIDIA driver, but torch cannot use it",
            "install the torch build for the CUDA version of this driver; give a container access to the GPUs",
        )
    bf16 = "with bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no bf16: use train.precision=float32"
    return ok(f"{versions}, {os.cpu_count()} CPU cores, no GPU, {bf16}")


def _threads() -> Check:
    threads, cores = os.environ.get("OMP_NUM_THREADS"), os.cpu_count() or 1
    if threads and threads.isdigit() and int(threads) > cores:
        return warn(
            f"OMP_NUM_THREADS is {threads}, but this machine has {cores} cores",
            f"unset OMP_NUM_THREADS, or set it to at most {cores}",
        )
    allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("MALLOC_MMAP_THRESHOLD_") or "default"
    return ok(f"OMP_NUM_THREADS {threads or 'unset'}, allocator {allocator}; a job sets both for its workers")


def _storage() -> Check:
    from pipeline.storage import files

    named = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN")
    if not any(os.environ.get(name) for name in named):
        return ok("no AWS_* variables are set; paths work, and buckets work if the machine has a role")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    try:
        buckets = files.list_names("s3://")
    except EnvironmentFault as fault:
        if "AccessDenied" in fault.message:
            return warn(
                f"{endpoint} accepts the credentials, but does not allow them to list buckets",
                "make sure that the credentials allow the job's buckets; a job checks them before it starts",
            )
        return fail(fault.message, fault.remedy)
    listed = ", ".join(buckets[:5]) + (", …" if len(buckets) > 5 else "")
    return ok(f"{endpoint} accepts the credentials; buckets: {listed or 'none yet'}")


def _tracking() -> Check:
    from pipeline.tracking.mlflow_run import check_tracker, default_uri

    uri = default_uri()
    shown = shown_url(uri)
    named = shown if "MLFLOW_TRACKING_URI" in os.environ else f"{shown}, because MLFLOW_TRACKING_URI is not set"
    database = sqlite_database(uri)
    if database and not database.exists():  # a job creates it
        if not os.access(existing(database), os.W_OK):
            return fail(
                f"{shown}: {existing(database)} is not writable",
                "set MLFLOW_TRACKING_URI to a server, or to a file in a folder that is writable",
            )
        return ok(f"{named}; the first job creates it")
    try:
        check_tracker(uri)
    except EnvironmentFault as fault:
        return fail(fault.message, fault.remedy)
    return ok(f"{named} answers")


def _disk() -> Check:
    cache = Path(DataSection.model_fields["cache"].default).expanduser()
    free = shutil.disk_usage(existing(cache)).free / 1e9
    found = f"{free:.0f} GB free for {cache}"
    if not os.access(existing(cache), os.W_OK):
        return fail(f"{cache} is not writable", "set data.cache to a writable folder on a disk of this node")
    if free < 2:
        return fail(found, "free some space, or set data.cache to a folder on a larger disk")
    if free < 20:
        return warn(
            found,
            "this is enough for a small collection; for a large one, set data.cache to a folder on a larger disk, or "
            "set data.cache_gb below the free space",
        )
    return ok(found)


def _shared_memory() -> Check:
    if not Path("/dev/shm").exists():
        return ok("this system has no /dev/shm; Ray uses a file")
    size = shutil.disk_usage("/dev/shm").total / 1e9
    if size < 1:
        return warn(
            f"/dev/shm has {size:.2f} GB; Ray and NCCL need more",
            "use docker run --shm-size=8g; on Kubernetes, mount an emptyDir with medium: Memory at /dev/shm",
        )
    return ok(f"/dev/shm has {size:.0f} GB")


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
        return warn(f"{path} does not exist", remedy)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(known.digest):
        return warn(f"{path} is not the published file: its SHA-256 begins with {digest[:8]}", remedy)
    return ok(f"{path} is the published file")


def existing(path: Path) -> Path:
    """Return the path, or its nearest ancestor that exists."""
    path = path.absolute()
    return path if path.exists() else existing(path.parent)


CHECKS: dict[str, Callable[[], Check]] = {
    "Python and torch": _torch,
    "threads": _threads,
    "S3": _storage,
    "MLflow": _tracking,
    "disk": _disk,
    "shared memory": _shared_memory,
    "Inception weights": _inception,
}
"""The checks of a machine by name."""
