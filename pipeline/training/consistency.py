"""All ranks hold the same finite state, or the run stops and names what is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import SaganError
from sagan.state import TrainState
from sagan.world import World

LOWER_RATES = "start anew under another name with lower learning rates; the checkpoints before this one stand"


def _fingerprint(tensor: Tensor) -> Tensor:
    """int64 sum over the tensor's bits: any single changed value changes it."""
    bits = tensor.detach().contiguous().view(torch.int32 if tensor.element_size() >= 4 else torch.int16)
    return bits.sum(dtype=torch.int64)


def check(state: TrainState, world: World) -> None:
    """Compare weights, u, statistics, moments and average across ranks. Collective.

    Raises SaganError on every rank where any tensor differs, naming the first.
    """
    if world.size == 1:
        return
    named = [(name, tensor) for name, tensor in state.tensors() if tensor.numel()]
    fingerprints = world.gather(torch.stack([_fingerprint(tensor) for _, tensor in named]))
    differs = (fingerprints != fingerprints[0]).any(dim=0).nonzero().flatten().tolist()
    if differs:
        raise SaganError(
            f"ranks disagree at {state.images / 1000:.1f} kimg: {named[differs[0]][0]} "
            f"(and {len(differs) - 1} more tensors) is not the same everywhere",
            "resume from the last checkpoint; if it happens again, a device computes wrongly or code ran on one rank",
        )


def require_finite(state: TrainState) -> None:
    """Raises SaganError naming the first tensor that holds NaN or infinity."""
    broken = [name for name, tensor in state.tensors() if not tensor.isfinite().all()]
    if broken:
        raise SaganError(
            f"training diverged at {state.images / 1000:.1f} kimg: "
            f"{broken[0]} (and {len(broken) - 1} more tensors) is not finite",
            LOWER_RATES,
        )
