"""One value that differs on one rank is found, and its tensor is named."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from pipeline.errors import SaganError
from pipeline.training.worker.rank_consistency import check_ranks
from sagan import ModelConfig, OptimConfig, TrainState, World

MODEL = ModelConfig(
    resolution=32,
    num_classes=3,
    channels_g=4,
    channels_d=4,
    multipliers_g=(4, 4, 4, 4),
    multipliers_d=(2, 2, 2, 2),
)


@dataclass(frozen=True)
class OneOfTwo(World):
    """Rank 0 of two. The other rank has sent what it gathers before."""

    size: int = 2
    sent: list[Tensor] = field(default_factory=list, compare=False)

    def gather(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor)
        return torch.stack([tensor, self.sent[0]])


@pytest.mark.parametrize("value", [1, -1], ids=["first", "last"])
def test_one_value_that_differs_is_found(value: int) -> None:
    state, world = TrainState(MODEL, OptimConfig(), 7), OneOfTwo()
    check_ranks(state, world)
    check_ranks(state, world)
    for name, tensor in state.tensors():
        if not tensor.numel():
            continue
        bits = tensor.detach().view(-1)
        kept = bits[min(value, 0)].clone()
        bits[min(value, 0)] = kept + 1 if tensor.dtype.is_floating_point else kept ^ 1
        with pytest.raises(SaganError, match=f"ranks disagree at 0.0 kimg: {name} "):
            check_ranks(state, world)
        bits[min(value, 0)] = kept
    check_ranks(state, world)
