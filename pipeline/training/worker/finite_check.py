"""Finds values that are not finite, without waiting for the device in a step."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import Diverged, EnvironmentFault
from sagan.train_state import TrainState

_LOWER_RATES = (
    "start a new run with another name and lower learning rates; the earlier checkpoints of this run are kept"
)


class NotFinite(EnvironmentFault):
    """Values of a step are not finite for the first time. The workers repeat the step from the newest checkpoint."""


def diverged(images: int, what: str) -> Diverged:
    """Return the error for values that are not finite twice at the same position. A device is not the cause then."""
    return Diverged(f"training diverged at {images / 1000:.1f} kimg, twice with the same state: {what}", _LOWER_RATES)


class FiniteCheck:
    """Checks the metrics of a step one step later, when the device has computed them.

    All ranks have the same gradients, so all ranks see the same result at the same step.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def step(self, images: int, values: Tensor) -> int | None:
        """Keep the values of the step that ends at position `images`, float [n], for the next call.

        Returns the position of the step before, where its values are not finite. Otherwise returns None.
        """
        found = self.last()
        event = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            values = host
        self._seen = (images, values, event)
        return found

    def last(self) -> int | None:
        """Return the position of the last step where its values are not finite; otherwise None."""
        if self._seen is None:
            return None
        images, values, event = self._seen
        if event is not None:
            event.synchronize()
        self._seen = None
        return None if bool(values.isfinite().all()) else images


def first_not_finite(state: TrainState) -> str | None:
    """Return the name of the first tensor of the state that holds NaN or infinity; None where all are finite.

    The host waits once for the device where all are finite.
    """
    named = list(state.tensors())
    # A sum is finite only if every term is, and it is computed many times as fast as the test of every term. The sum of
    # large finite terms may be infinite, too.
    if bool(torch.stack([tensor.sum().float() for _, tensor in named]).isfinite().all()):
        return None
    finite = torch.stack([tensor.isfinite().all() for _, tensor in named]).tolist()
    return next((name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite), None)
