"""torch's settings in a process: allocator, threads, and the precision of float32 arithmetic."""

from __future__ import annotations

import os

import torch

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
