"""Settings of a process for its device: allocator settings for its environment, and torch settings."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch

from pipeline.compute.resources import cluster_resources

ALLOCATOR = {
    # With its defaults, glibc returns the memory of large activations to the kernel. Each new one costs page faults.
    "cpu": {
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30),
        "MALLOC_TOP_PAD_": str(256 * 2**20),
    },
    "cuda": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
}
"""Environment variables of a training process, by device type. An allocator reads them when the process starts."""


def worker_device() -> torch.device:
    """Return the GPU that Ray Train gave to this worker, or the CPU where it gave none."""
    import ray
    from ray.train.torch import get_device

    device: torch.device = get_device() if ray.get_gpu_ids() else torch.device("cpu")
    return device


def configure_device(device: torch.device) -> None:
    """Set torch's settings for the process.

    On CUDA, convolutions of float32 use TF32. Matrix products do not: the statistics of batch norm and the power
    iterations need all bits of float32. On CPUs, use OMP_NUM_THREADS threads and flush denormals to zero. Optimiser
    moments of classes without images decay into denormals, and arithmetic with denormals takes four times as long.
    """
    if device.type == "cuda":
        _set_float32(convolutions="tf32", products="ieee")
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.set_flush_denormal(True)


def disable_tf32() -> None:
    """Let float32 convolutions and matrix products on CUDA use all bits of float32, in the whole process."""
    _set_float32(convolutions="ieee", products="ieee")


def _set_float32(convolutions: str, products: str) -> None:
    """Set the arithmetic of float32 convolutions and of matrix products on CUDA: "tf32" or "ieee"."""
    torch.backends.cudnn.conv.fp32_precision = convolutions  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = products


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
