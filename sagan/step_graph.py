"""A training step as a CUDA graph: the device runs all its kernels at one call of the host."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from sagan.device import is_cuda
from sagan.ranks import World
from sagan.step_inputs import Inputs

WARM_UP = 11
"""Steps before the recorded one. They create the moments of Adam, and cuDNN and cuBLAS choose their kernels. DDP lays
out its buckets in the first, and takes times with CUDA's events in the first ten."""


@dataclass(frozen=True)
class _Recording:
    """A recorded step: the graph, the tensors that it reads and the tensor that it writes."""

    graph: torch.cuda.CUDAGraph
    ema_decay: float
    inputs: Inputs
    metrics: Tensor


class StepGraph:
    """Records a step once and replays it with the same results.

    A step of SAGAN runs thousands of kernels. With small batches, Python takes longer to launch them than the device to
    run them. A recorded kernel always reads and writes the same memory. So inputs are copied into the recorded ones,
    and the step must update its state in place.

    NCCL's collectives are recorded too. All ranks record after the same number of steps, and recording runs nothing. A
    rank that cannot record calls the same collectives in the same order as the replays of the others.

    Args:
        compute: the step. It takes inputs and the decay of the moving average, and waits for nothing. Its collectives
            are NCCL's.
        optimizers: the optimisers that the step uses. Their learning rates become float32 tensors, which a recording
            reads.
    """

    def __init__(self, compute: Callable[[Inputs, float], Tensor], optimizers: Sequence[torch.optim.Adam]) -> None:
        self._compute, self._optimizers = compute, optimizers
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
                group["capturable"] = True
        self._eager_steps = 0
        self._recording: _Recording | None = None
        self._fails = False

    @staticmethod
    def serves(device: torch.device, world: World, batch: int) -> bool:
        """Return whether steps on the device, with the collectives of `world`, can be recorded.

        A recorded step has fixed shapes. If the ranks do not divide the batch, a rank's share changes between steps.
        """
        return is_cuda(device) and batch % world.size == 0 and (world.size == 1 or dist.get_backend() == "nccl")

    @property
    def records(self) -> bool:
        """Whether the steps are recorded by now."""
        return self._recording is not None

    def __call__(self, inputs: Inputs, ema_decay: float) -> Tensor:
        """Run the step, and return its metrics."""
        if self._fails or self._eager_steps < WARM_UP:
            self._eager_steps += 1
            return self._compute(inputs, ema_decay)
        if self._recording is None or self._recording.ema_decay != ema_decay:
            self._recording = None  # frees its memory
            try:
                self._recording = self._record(inputs, ema_decay)
            except RuntimeError as error:
                warnings.warn(f"the step cannot be recorded as a CUDA graph: {error}", stacklevel=3)
                self._fails = True
                for optimizer in self._optimizers:
                    optimizer.zero_grad()  # gradients of a recording hold no numbers
                return self._compute(inputs, ema_decay)
        torch._foreach_copy_(self._recording.inputs.tensors(), inputs.tensors())
        self._recording.graph.replay()
        return self._recording.metrics.clone()

    def _record(self, inputs: Inputs, ema_decay: float) -> _Recording:
        """Record the step without running it."""
        # Each replay overwrites the recorded inputs. Real images belong to the caller, so the recording has copies.
        inputs = replace(inputs, real=[(images.clone(), labels.clone()) for images, labels in inputs.real])
        graph = torch.cuda.CUDAGraph()
        # Other threads page-lock memory meanwhile.
        with _no_garbage_collection(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            metrics = self._compute(inputs, ema_decay)
        return _Recording(graph, ema_decay, inputs, metrics)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect garbage before, and none inside: freeing an older recording invalidates one that is being made."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Run the work of a CUDA device in a new stream; do nothing on another device. Make DDP in it.

    DDP's nodes for gradients keep the stream in which DDP is made, and CUDA's default stream cannot be recorded.
    """
    if not is_cuda(device):
        yield
        return
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
