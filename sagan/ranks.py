"""Rank and size of the processes that train together, as a value that is passed in and never global."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
"""Gathers into one tensor. Its old name warns of its end from torch 2.13 on."""


@dataclass(frozen=True)
class World:
    """One of `size` processes that train together. The default is a single process, which calls no collective.

    Attributes:
        rank: number of this process, 0 … size − 1.
        size: number of processes.
        joint: promise that every rank runs the code that gets this value. A forward that needs all ranks requires the
            promise. Without it the forward raises an error instead of waiting for ranks that never come.
        waits: returns a context in which a collective runs, for example to take the time of it.
    """

    rank: int = 0
    size: int = 1
    joint: bool = False
    waits: Callable[[], AbstractContextManager[object]] = field(default=nullcontext, compare=False, repr=False)

    @classmethod
    def current(cls) -> World:
        """Return the world of the default process group, or a world of one where no group is initialised."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def joined(self) -> World:
        """Return this world with the promise that all ranks take part."""
        return replace(self, joint=True)

    def part(self, number: int, parts: int) -> World:
        """Return part `number` of the `parts` into which this rank divides its share.

        A part is one rank of a world of size × parts ranks.
        """
        return World(self.rank + self.size * number, self.size * parts)

    def share(self, start: int, stop: int) -> range:
        """Return this rank's positions in [start, stop): all p with p mod size = rank.

        The lengths of the shares of two ranks differ by at most one.
        """
        return range(start + (self.rank - start) % self.size, stop, self.size)

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite `tensor` with the tensor of rank 0, and return it."""
        if self.size > 1:
            with self.waits():
                dist.broadcast(tensor, src=0)
        return tensor

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over ranks in place, and return it."""
        if self.size > 1:
            with self.waits():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks in rank order, [size, *tensor.shape]."""
        gathered = tensor.new_empty(self.size, *tensor.shape)
        if self.size > 1:
            with self.waits():
                _all_gather(gathered.flatten(), tensor.contiguous().flatten())
        else:
            gathered[0] = tensor
        return gathered
