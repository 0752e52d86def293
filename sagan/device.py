"""What depends on the device: copies to it and from it, and the kernels that it has."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a copy of a host tensor on `device`, without waiting for the device."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors of the host with the numbers of `tensors`. The host waits once for each device.

    Copies from CUDA are in page-locked memory.
    """
    copies = {name: tensor.contiguous().to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def is_cuda(device: torch.device) -> bool:
    """Return whether a device is one of CUDA. torch names ROCm's devices `cuda` too, and they are not."""
    return device.type == "cuda" and torch.version.cuda is not None


_LEAST_ELEMENTS = 2**20  # of a map; measured on one H200 (torch 2.11)


def kernels(x: Tensor) -> Any:
    """Return the module `cuda_kernels` where it serves maps like x, and None elsewhere.

    Maps below 2²⁰ elements gain nothing.
    """
    return _cuda_kernels() if is_cuda(x.device) and x.numel() >= _LEAST_ELEMENTS else None


@functools.cache
def _cuda_kernels() -> Any:
    """Return the module, or None after a warning where Triton is missing or cannot compile."""
    try:
        from sagan import cuda_kernels

        cuda_kernels.image_statistics(torch.ones(1, 1, 1, 1, device="cuda"))
    except Exception as error:  # no Triton, no C compiler for what it compiles, or a GPU that it does not know
        warnings.warn(f"Triton's kernels cannot be used, so training takes longer: {error}", stacklevel=2)
        return None
    return cuda_kernels
