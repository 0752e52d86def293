"""Settings of a process for its device: allocator settings for its environment, and torch settings."""

from __future__ import annotations

import os
from typing import Literal

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


def configure_device(device: torch.device) -> None:
    """Set torch's settings for the process.

    On CUDA, enable TF32. On CPUs, use OMP_NUM_THREADS threads and flush denormals to zero. Optimiser moments of classes
    without images decay into denormals, and arithmetic with denormals takes four times as long.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.set_flush_denormal(True)


def uses_gpu(device: Literal["auto", "cpu", "cuda"]) -> bool:
    """Return whether each worker of a job with `resources.device: device` gets a GPU.

    `auto` means: if the connected cluster has GPUs.
    """
    return cluster_resources()["GPU"] >= 1 if device == "auto" else device == "cuda"
