"""One process with the whole batch equals several ranks that share it, through the real DDP path on gloo.

Bounds were measured over several seeds: in float64 everything agrees to 1e-9 after five Adam updates, while batch norm
without synchronisation differs by more than 1e-5. In float32 only the gradients of the first update can tell right from
wrong: biases before a batch norm have zero true gradient, and Adam turns their rounding noise into whole steps.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sagan import ModelConfig, OptimConfig, Step, TrainState, World, spectral_norm
from sagan.batch_norm import Groups
from sagan.config import Augmentation
from sagan.random import Purpose, draw_labels, draw_latents

BATCH, UPDATES = 32, 5
RATES = OptimConfig(ema_decay=0.9)
CONDITIONAL = ModelConfig(resolution=32, num_classes=10, channels_g=4, channels_d=4, z_dim=16)

DCGAN = ModelConfig(
    resolution=32,
    num_classes=0,
    architecture="dcgan",
    channels_g=4,
    channels_d=4,
    z_dim=16,
    slope_d=0.2,
    spectral_norm_g=False,
    spectral_norm_d=False,
    init_std=0.02,
)
ACGAN = replace(DCGAN, resolution=128, num_classes=10, architecture="acgan", condition_d="classifier", channels_d=1)
# ε: biases before a batch norm have no gradient, and small initial weights make its rounding noise larger
BCE = OptimConfig(lr_d=2e-4, lr_g=2e-4, ema_decay=0.9, beta1=0.5, eps=1e-7, loss="bce")


@dataclass(frozen=True)
class Case:
    """A system, and how it is trained by every rank."""

    model: ModelConfig = CONDITIONAL
    optim: OptimConfig = RATES
    batch: int = BATCH
    dtype: torch.dtype = torch.float64
    updates: int = UPDATES
    micro_batch: int | None = None
    augment: Augmentation | None = None
    disturbed: bool = False  # u of rank 1's discriminator is moved after the first update


SYSTEMS = {
    "conditional": Case(),
    "unconditional": Case(replace(CONDITIONAL, num_classes=0)),
    "five discriminator updates": Case(optim=OptimConfig(n_dis=5, ema_decay=0.9), updates=3),
    "unequal on four": Case(batch=30),
    "groups of 8": Case(replace(CONDITIONAL, batch_norm_group=8)),
    "groups of 16": Case(replace(CONDITIONAL, batch_norm_group=16)),
    "SNGAN-projection": Case(
        replace(CONDITIONAL, thin_d=True, attention=()), OptimConfig(n_dis=2, lr_decay_kimg=(0, 1))
    ),
    "norm on D only": Case(replace(CONDITIONAL, spectral_norm_g=False)),
    "official norm": Case(replace(CONDITIONAL, spectral_norm_gradient="through", spectral_norm_start="cold")),
    "attention of the paper": Case(replace(CONDITIONAL, attention=(8, 16), attention_form="icml")),
    "attention of the first version": Case(replace(CONDITIONAL, attention_form="first")),
    "residual control 1x1": Case(replace(CONDITIONAL, attention_form="residual_1x1")),
    "residual control 3x3": Case(replace(CONDITIONAL, attention_form="residual_3x3")),
    "AC-GAN": Case(replace(CONDITIONAL, condition_d="classifier"), OptimConfig(ema_decay=0.9, auxiliary_weight=0.5)),
    "cross-entropy": Case(optim=BCE),
    "DCGAN": Case(DCGAN, BCE),
    "DCGAN, unequal": Case(DCGAN, BCE, batch=30),
    "DCGAN, groups of 8": Case(replace(DCGAN, batch_norm_group=8), BCE),
    "DCGAN with classes, norm and attention": Case(
        replace(
            CONDITIONAL, architecture="dcgan", attention=(16,), channels_g=8, channels_d=8, condition_d="classifier"
        ),
        BCE,
    ),
    "augmented": Case(optim=OptimConfig(n_dis=2, ema_decay=0.9), batch=30, updates=3, augment="diffaugment"),
    "augmented DCGAN": Case(DCGAN, BCE, augment="diffaugment"),
    "AC-GAN of 2017": Case(ACGAN, BCE, batch=30, updates=3),
    "AC-GAN of 2017, groups of 8": Case(replace(ACGAN, batch_norm_group=8), BCE, updates=3),
    "leaky": Case(replace(CONDITIONAL, num_classes=0, slope_g=0.02, slope_d=0.2)),
}
FAST = ("conditional", "augmented", "augmented micro-batches")
EVERYWHERE = (
    "conditional",
    "unequal on four",
    "unconditional",
    "five discriminator updates",
    "groups of 8",
    "groups of 16",
    "augmented",
)
MICRO = {
    "micro-batches": Case(replace(CONDITIONAL, batch_norm_group=4), micro_batch=4),
    "augmented micro-batches": Case(replace(CONDITIONAL, batch_norm_group=4), micro_batch=4, augment="diffaugment"),
}
CONTROLS = {
    "apart": Case(replace(CONDITIONAL, batch_norm_group=16)),  # statistics of each rank's own half
    "disturbed": Case(disturbed=True),
    "float32": Case(dtype=torch.float32, updates=1),
}


def real(start, world, num_classes, batch=BATCH, size=32):
    share = world.share(start, start + batch)
    pixels = draw_latents(1, Purpose.DEQUANTISE, share, 3 * size**2).view(-1, 3, size, size).clamp(-1, 1)
    return pixels, draw_labels(1, Purpose.DEQUANTISE, share, num_classes)


def train(world, case):
    """Everything that must agree, after the case's updates, and the gradients of the first."""
    torch.set_num_threads(1)
    state = TrainState(case.model, case.optim, seed=3).to(case.dtype)
    with torch.no_grad():  # attention takes part from the first step on
        for network in (state.generator, state.discriminator):
            for name, parameter in network.named_parameters():
                if name.endswith("gamma"):
                    parameter.fill_(0.5)
    step = Step(state, case.batch, world, micro_batch=case.micro_batch, augment=case.augment)
    found, losses = {}, []
    keep = [_keep_gradients(state.generator, state.optimizer_g, found)]
    keep.append(_keep_gradients(state.discriminator, state.optimizer_d, found))
    for update in range(case.updates):
        starts = [state.images + k * case.batch for k in range(case.optim.n_dis)]
        classes, size = case.model.known_num_classes or 10, case.model.known_resolution
        pairs = [real(start, world, classes, case.batch, size) for start in starts]
        losses.append(world.sum_(step([(pixels.to(case.dtype), y) for pixels, y in pairs])))
        for hook in keep:
            hook.remove()
        if case.disturbed and update == 0 and world.rank == 1:
            state.discriminator.linear.u = -state.discriminator.linear.u.roll(1) + 0.1
            layer = state.discriminator.blocks[0].conv1
            layer.u = layer.u.roll(1)
            spectral_norm.power_iteration([layer])
    found |= {f"state/{name}": tensor.clone() for name, tensor in state.tensors()}
    found["losses"] = torch.stack(losses)
    z, y = (
        draw_latents(4, Purpose.SAMPLE_Z, range(8), 16).to(case.dtype),
        torch.arange(8) if case.model.known_num_classes else None,
    )
    with torch.no_grad():
        found["images"] = state.generator(z, y, Groups(range(8), 1, World(), torch.device("cpu")))
        found["logits"] = state.discriminator(found["images"], y)
    return found


def _keep_gradients(network, optimizer, found):
    def keep(*_):
        for name, parameter in network.named_parameters():
            found.setdefault(f"gradient/{type(network).__name__}/{name}", parameter.grad.clone())

    return optimizer.register_step_pre_hook(keep)


def _rank(rank, size, folder, cases):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    for name, case in cases.items():
        torch.save(train(World.current(), case), Path(folder) / f"{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(size, case names) → {name: what each rank found}. The ranks of a size start once for all its cases."""
    every = SYSTEMS | MICRO | CONTROLS

    def run(size, names):
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        cases = {name: every[name] for name in names}
        if size == 1:
            return {name: [train(World(), case)] for name, case in cases.items()}
        mp.spawn(_rank, (size, folder, cases), nprocs=size)
        return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(size)] for name in names}

    return run


def largest_difference(a, b, part):
    return max((a[name] - b[name]).abs().max().item() for name in a if name.startswith(part) and a[name].numel())


def require_equal(alone, together):
    for part in ("state", "losses", "images", "logits", "gradient"):
        assert largest_difference(alone, together[0], part) < 1e-9, part
    for other in together[1:]:
        assert all(torch.equal(together[0][name], other[name]) for name in other)


def test_two_ranks_equal_one_process_and_the_comparison_sees_mistakes(trained):
    alone, together = trained(1, (*FAST, "float32")), trained(2, (*FAST, *CONTROLS))
    for name in FAST:
        require_equal(alone[name][0], together[name])

    # statistics of each rank's own half are another function
    expected, apart = alone["conditional"][0], together["apart"][0]
    assert largest_difference(expected, apart, "state/generator") > 1e-5
    assert largest_difference(expected, apart, "images") > 1e-3
    # one rank's u moved by hand: its σ is another for a step, and every rank's weights are wrong from then on
    disturbed = together["disturbed"]
    assert largest_difference(expected, disturbed[0], "state/discriminator") > 1e-5

    for network, bound in (("Discriminator", 1e-3), ("Generator", 1e-2)):
        one, two = alone["float32"][0], together["float32"][0]
        gradients = [name for name in one if name.startswith(f"gradient/{network}")]
        ours, theirs = (torch.cat([found[name].flatten() for name in gradients]) for found in (two, one))
        assert (ours - theirs).norm() / theirs.norm() < bound


@pytest.mark.slow
@pytest.mark.parametrize(("size", "names"), [(2, tuple(SYSTEMS)), (3, EVERYWHERE), (4, EVERYWHERE)])
def test_every_system_on_every_number_of_ranks(trained, size, names):
    """2 × 16; 3 ranks with 11, 11 and 10 images; 4 × 8, and 4 ranks with 8, 8, 7 and 7."""
    alone, together = trained(1, names), trained(size, names)
    for name in names:
        require_equal(alone[name][0], together[name])


@pytest.mark.slow
def test_micro_batches_on_four_ranks(trained):
    alone, together = trained(1, tuple(MICRO)), trained(4, tuple(MICRO))
    for name in MICRO:
        require_equal(alone[name][0], together[name])


def forked(function, size, folder):
    """Run `function(rank, size, folder)` in `size` processes, forked from one that has imported torch."""
    mp.set_forkserver_preload(["sagan", "torch._dynamo"])
    mp.start_processes(function, (size, folder), nprocs=size, start_method="forkserver")


def _lone_grid(rank, size, folder):
    """Rank 0 alone draws grids; the other goes on to the next collective at once."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    world = World.current()
    state = TrainState(CONDITIONAL, OptimConfig(), seed=3)
    step = Step(state, BATCH, world)
    step([real(0, world, 10)])
    if rank == 0:
        z, y = draw_latents(4, Purpose.SAMPLE_Z, range(8), 16), torch.arange(8)
        before = {name: tensor.clone() for name, tensor in state.tensors()}
        grid = state.generator.train()(z, y)
        state.discriminator.train()(grid, y)
        assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors())
        with pytest.raises(ValueError, match="every rank must run this forward"):
            state.generator(z, y, Groups(range(0, 16, 2), 1, world, torch.device("cpu")))
    step([real(state.images, world, 10)])
    torch.save(dict(state.tensors()), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_grid_on_one_rank_moves_nothing_and_cannot_hang(tmp_path):
    forked(_lone_grid, 2, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def _restarted(rank, size, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.set_num_threads(1)
    world = World.current()
    undisturbed, restarted = (TrainState(CONDITIONAL, RATES, seed=3) for _ in range(2))
    step = Step(undisturbed, BATCH, world)
    for _ in range(3):
        step([real(undisturbed.images, world, 10)])
        Step(restarted, BATCH, world)([real(restarted.images, world, 10)])
    for (name, a), (_, b) in zip(undisturbed.tensors(), restarted.tensors(), strict=True):
        assert torch.equal(a, b), name
    dist.destroy_process_group()


def test_a_state_that_goes_on_in_a_new_process_has_the_same_bits(tmp_path):
    """Sums of three ranks depend on the order of the summands, and those of two ranks do not."""
    forked(_restarted, 3, tmp_path)
