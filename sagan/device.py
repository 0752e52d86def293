"""What depends on the device: copies to it, and the kernels that it has."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a copy of a host tensor on `device`, without waiting for the device."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


def kernels(x: Tensor) -> Any:
    """Return the module `cuda_kernels` where its kernels run on the device of x, and None elsewhere."""
    return _cuda_kernels() if x.device.type == "cuda" and torch.version.cuda is not None else None


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
