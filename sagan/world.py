"""Who trains with whom: the one value that says rank and size, passed in and never global."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """One of `size` processes that train together. Alone by default, and then no collective is ever called.

    `joint` promises that every rank runs what this value is passed to. A forward that needs all ranks asks for the
    promise instead of waiting for ranks that never come.
    """

    rank: int = 0
    size: int = 1
    joint: bool = False

    @classmethod
    def current(cls) -> World:
        """The world of the initialised default process group, or a world of one."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def joined(self) -> World:
        """This world with the promise that all ranks take part."""
        return replace(self, joint=True)

    def part(self, number: int, parts: int) -> World:
        """Part `number` of the `parts` into which this rank divides its share: one rank of a larger world."""
        return World(self.rank + self.size * number, self.size * parts)

    def share(self, start: int, stop: int) -> range:
        """This rank's positions of [start, stop): those p with p mod size = rank. Shares differ by at most one."""
        return range(start + (self.rank - start) % self.size, stop, self.size)

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite `tensor` with rank 0's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[size, *tensor.shape]: the tensor of every rank, in rank order."""
        gathered = tensor.new_empty(self.size, *tensor.shape)
        if self.size > 1:
            dist.all_gather(list(gathered.unbind()), tensor.contiguous())
        else:
            gathered[0] = tensor
        return gathered


def on_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A host tensor on `device`, without waiting for the device."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)
