"""A program of `test_collectives.py`: recorded steps with NCCL's collectives equal steps that are not recorded."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sagan.step_graph import WARM_UP, StepGraph, side_stream
from sagan.step_inputs import Inputs

DEVICE = torch.device("cuda")


class Training:
    """A network that is trained with DDP, and a number that all ranks gather and broadcast."""

    def __init__(self):
        torch.manual_seed(0)
        self.plain = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).to(DEVICE)
        with side_stream(DEVICE):
            self.network = DistributedDataParallel(self.plain, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.Adam(self.plain.parameters(), lr=2.0**-8)
        self.seen = torch.zeros(1, device=DEVICE)

    def step(self, inputs, ema_decay):
        (x, y), *_ = inputs.real
        loss = (self.network(x).squeeze(1) - y).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        gathered = torch.empty(dist.get_world_size(), device=DEVICE)
        dist.all_gather_into_tensor(gathered, loss.detach()[None])
        self.seen += gathered.sum()
        dist.broadcast(self.seen, src=0)
        return torch.stack([loss.detach(), self.seen[0]])


def batch(number):
    drawn = torch.Generator().manual_seed(number)
    return Inputs(
        [(torch.randn(16, 8, generator=drawn).to(DEVICE), torch.randn(16, generator=drawn).to(DEVICE))], [], []
    )


def main():
    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    recorded, eager = Training(), Training()
    graph = StepGraph(recorded.step, [recorded.optimizer])
    for number in range(WARM_UP + 10):
        ours, theirs = graph(batch(number), 0.0), eager.step(batch(number), 0.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32; the order of sums differs
    assert graph.records
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
