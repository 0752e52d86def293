"""A program of `test_collectives.py`: two ranks with recorded steps train like one process."""

import torch
import torch.distributed as dist

from pipeline.compute.torch_settings import configure_device
from sagan import ModelConfig, OptimConfig, Step, TrainState
from sagan.ranks import World
from sagan.step_graph import WARM_UP

MODEL = ModelConfig(resolution=32, num_classes=10, channels_g=8, channels_d=8, z_dim=16)
OPTIM = OptimConfig(lr_d=2.0**-11, lr_g=2.0**-13)
BATCH = 16


def trained(world):
    state = TrainState(MODEL, OPTIM, seed=1, device="cuda").to(torch.float64)
    step = Step(state, BATCH, world)
    losses = []
    for number in range(WARM_UP + 6):
        drawn = torch.Generator().manual_seed(number)
        images = torch.rand(BATCH, 3, 32, 32, dtype=torch.float64, generator=drawn) * 2 - 1
        labels = torch.randint(0, 10, (BATCH,), generator=drawn)
        rows = list(world.share(0, BATCH))
        losses.append(step([(images[rows].cuda(), labels[rows].cuda())]))
    assert step.graph.records
    return state, torch.stack(losses)


def main():
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank())
    configure_device(torch.device("cuda"))
    ours, losses = trained(World.current())
    dist.all_reduce(losses)
    if dist.get_rank() == 0:
        theirs, expected = trained(World())
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-8)
        for (name, a), (_, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=lambda message, name=name: f"{name}: {message}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
