"""What a process that trains is told about its machine: some of it before it starts, the rest first thing."""

from __future__ import annotations

import os

import torch

ALLOCATOR = {
    # glibc returns every large activation to the kernel by default and pays for it in page faults
    "cpu": {
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30),
        "MALLOC_TOP_PAD_": str(256 * 2**20),
    },
    "cuda": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
}
"""Environment of a training process by device type; an allocator reads it once, at the start."""


def prepare(device: torch.device) -> None:
    """TF32 where precision is float32 on CUDA; on CPUs the threads of OMP_NUM_THREADS, and no denormals.

    Optimiser moments of classes that are not seen decay into denormals, which cost four times as much as other numbers.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.set_flush_denormal(True)
