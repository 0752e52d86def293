"""Checks that all ranks hold the same state. A failed check stops the run and names a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import SaganError
from sagan.ranks import World
from sagan.train_state import TrainState


def _fingerprint(tensor: Tensor) -> Tensor:
    """Return the int64 sum over the tensor's bits, modulo 2⁶⁴. A change of any single value changes the sum."""
    bits = tensor.detach().contiguous().flatten().view(torch.int32 if tensor.element_size() >= 4 else torch.int16)
    each = 8 // bits.element_size()  # words of 64 bits are summed twenty times as fast as their parts
    words = len(bits) // each * each
    if bits.storage_offset() % each:
        bits = bits.clone()
    total = bits[:words].view(torch.int64).sum()
    return total if words == len(bits) else total + bits[words:].sum(dtype=torch.int64)


def check_ranks(state: TrainState, world: World) -> None:
    """Compare weights, u, batch-norm statistics, optimiser moments and moving averages across ranks. Collective.

    Raises SaganError on every rank where a tensor differs between ranks. The message names the first such tensor.
    """
    if world.size == 1:
        return
    named = [(name, tensor) for name, tensor in state.tensors() if tensor.numel()]
    fingerprints = world.gather(torch.stack([_fingerprint(tensor) for _, tensor in named]))
    marks = (fingerprints != fingerprints[0]).any(dim=0).tolist()  # the only wait for the device
    if differs := [name for (name, _), differ in zip(named, marks, strict=True) if differ]:
        raise SaganError(
            f"ranks disagree at {state.images / 1000:.1f} kimg: {differs[0]} "
            f"and {len(differs) - 1} other tensors differ between ranks",
            "resume from the last checkpoint; if this happens again, look for a faulty device or for code that runs on "
            "one rank only",
        )
