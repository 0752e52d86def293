"""Networks that Inductor compiles train as they do without it.

The product does not compile (jobs/LOG.md, 2026-11-26), but whoever uses `sagan` as a library may.
"""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from infra.local.server_process import free_port
from sagan import ModelConfig, OptimConfig, Step, TrainState
from sagan.ranks import World

# Dynamo makes instances of autograd functions, of which torch warns.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

MODEL = ModelConfig(resolution=32, num_classes=3, channels_g=4, channels_d=4, z_dim=8, attention=(16,))
OPTIM = OptimConfig(lr_d=2.0**-11, lr_g=2.0**-13)
BATCH, STEPS = 8, 3


def trained(dtype: torch.dtype, world: World, *, compiled: bool) -> torch.Tensor:
    """Return this rank's parts of the metrics of each step, [STEPS, metrics]."""
    state = TrainState(MODEL, OPTIM, seed=1).to(dtype)
    if compiled:
        for network in (state.generator, state.discriminator):
            network.compile(dynamic=False)
    step, rows = Step(state, BATCH, world), list(world.share(0, BATCH))
    metrics = []
    for number in range(STEPS):
        drawn = torch.Generator().manual_seed(number)
        images = torch.rand(BATCH, 3, 32, 32, dtype=torch.float64, generator=drawn) * 2 - 1
        labels = torch.randint(0, 3, (BATCH,), generator=drawn)
        metrics.append(step([(images[rows].to(dtype), labels[rows])]))
    return torch.stack(metrics)


def test_compiled_networks_train_to_the_same_losses() -> None:
    """In float32, where fused operations round in another order. Losses and norms of gradients are about 10."""
    ours, expected = (trained(torch.float32, World(), compiled=compiled) for compiled in (True, False))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_compiled_networks_train_on_two_ranks() -> None:
    mp.spawn(_rank, (free_port(),), nprocs=2)


def _rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ours, expected = (trained(torch.float64, World.current(), compiled=compiled) for compiled in (True, False))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.distributed.destroy_process_group()
