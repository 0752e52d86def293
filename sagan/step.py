"""One training step, the only code that trains: n_dis discriminator updates, then one generator update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sagan import batch_norm, ema, spectral_norm
from sagan.batch_norm import Groups
from sagan.losses import discriminator_hinge, generator_hinge
from sagan.random import Purpose, labels, latents
from sagan.state import TrainState
from sagan.world import World, on_device

METRICS = ("loss_d", "loss_g", "logit_real", "logit_fake")


class Step:
    """`metrics = step(batches)` moves a state by n_dis × batch images.

    Latents and labels come from (seed, position); losses are local sums × ranks / batch, so that DDP's mean over ranks
    is the mean over the global batch, whatever each rank's share.

    Args:
        batch: global batch, the same on any number of ranks.
        precision: "float32" (the state's own type) or "bf16" (autocast; statistics, σ, softmax, logits stay float32).
        micro_batch: at most so many real images of a rank are in memory at once; gradients add up to the same step.

    Raises ValueError where a batch cannot be accumulated exactly (see `passes`).
    """

    def __init__(
        self,
        state: TrainState,
        batch: int,
        world: World | None = None,
        precision: str = "float32",
        micro_batch: int | None = None,
    ) -> None:
        self.state, self.batch, self.precision = state, batch, precision
        self.world = (World() if world is None else world).joined()
        self.device = next(state.generator.parameters()).device
        self.dtype = next(state.generator.parameters()).dtype
        self.groups = batch // (state.model.batch_norm_group or batch)
        self.passes = passes(batch, self.world.size, self.groups, micro_batch)
        self.generator = self._distribute(state.generator)
        self.discriminator = self._distribute(state.discriminator)

    def __call__(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """n_dis pairs of this rank's real images ([b, 3, H, W] in [−1, 1]) and labels (int64 [b]).

        Returns float [len(METRICS)]: this rank's part of each metric; the sum over ranks is the metric. Nothing is
        copied to the host.
        """
        state = self.state
        start = state.images
        for real, y in batches:
            loss_d, logit_real, logit_fake = self._update_discriminator(start, real, y)
            start += self.batch
        loss_g = self._update_generator(state.images)
        state.images = start
        decay = state.optim.ema_decay if start >= 1000 * state.optim.ema_start_kimg else 0.0
        ema.update(state.average, state.generator, decay)
        return torch.stack([loss_d, loss_g, logit_real, logit_fake])

    def _update_discriminator(self, start: int, real: Tensor, y: Tensor) -> Tensor:
        """Sums of the loss and of the two logits over this rank's images, over the batch."""
        state = self.state
        metrics = torch.zeros(3, dtype=self.dtype, device=self.device)
        for part in self._parts(self.discriminator):
            mine = self._rows(start, part)
            images = real[mine]
            with torch.no_grad(), self._autocast():
                z, y_fake, groups = self._draw(start, part, Purpose.Z_D, Purpose.Y_D)
                fake = state.generator(z, y_fake, groups)
            with self._autocast():
                both_y = torch.cat([y[mine], y_fake]) if y_fake is not None else None
                both = torch.cat([images.to(fake.dtype), fake]).contiguous(memory_format=torch.channels_last)
                logit_real, logit_fake = self.discriminator(both, both_y).split([len(images), len(fake)])
            loss = discriminator_hinge(logit_real, logit_fake) / self.batch
            self._backward(loss)
            with torch.no_grad():
                metrics += torch.stack([loss, logit_real.sum() / self.batch, logit_fake.sum() / self.batch])
        self._descend(state.optimizer_d, state.optim.lr_d)
        spectral_norm.advance(state.discriminator, self.world)
        return metrics

    def _update_generator(self, start: int) -> Tensor:
        """This rank's part of the loss."""
        state = self.state
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        used = []
        state.discriminator.requires_grad_(False)
        for part in self._parts(self.generator):
            with self._autocast():
                z, y, groups = self._draw(start, part, Purpose.Z_G, Purpose.Y_G)
                logits = state.discriminator(self.generator(z, y, groups), y)
            loss = generator_hinge(logits) / self.batch
            self._backward(loss)
            total += loss.detach()
            used.append(batch_norm.used(state.generator))
        state.discriminator.requires_grad_(True)
        self._descend(state.optimizer_g, state.optim.lr_g)
        spectral_norm.advance(state.generator, self.world)
        batch_norm.track(state.generator, torch.stack(used).mean(0), self.world)
        return total

    # --- a pass ------------------------------------------------------------------------------------------------------

    def _parts(self, network: nn.Module) -> Iterator[World]:
        """One pass after the other; ranks exchange `network`'s gradients in the last."""
        for number in range(self.passes):
            last = number == self.passes - 1
            waits = isinstance(network, DistributedDataParallel) and not last
            with network.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                yield self.world if self.passes == 1 else self.world.part(number, self.passes)

    def _rows(self, start: int, part: World) -> slice:
        """Where a pass's images stand in this rank's share of the batch at `start`."""
        share, mine = (world.share(start, start + self.batch) for world in (self.world, part))
        return slice((mine.start - share.start) // self.world.size, None, self.passes)

    def _draw(self, start: int, part: World, z: Purpose, y: Purpose) -> tuple[Tensor, Tensor | None, Groups]:
        """A pass's latents, labels and batch-norm groups of the batch that starts at `start`."""
        model, seed = self.state.model, self.state.seed
        positions = part.share(start, start + self.batch)
        rows = on_device(latents(seed, z, positions, model.z_dim), self.device, self.dtype)
        classes = on_device(labels(seed, y, positions, model.labels), self.device) if model.labels else None
        return rows, classes, Groups(positions, self.groups, part, self.device)

    def _backward(self, loss: Tensor) -> None:
        (loss * self.world.size).backward()

    def _descend(self, optimizer: torch.optim.Adam, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr * self.state.optim.lr_factor(self.state.images)
        optimizer.step()
        optimizer.zero_grad()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _distribute(self, network: nn.Module) -> nn.Module:
        """DDP over the ranks. Buffers are never synchronised by it: u and the statistics have their own places."""
        if self.world.size == 1:
            return network
        return DistributedDataParallel(network, forward_sync_buffers=False, gradient_as_bucket_view=True)


def passes(batch: int, ranks: int, groups: int, micro_batch: int | None) -> int:
    """Passes in which each rank's share of a batch is taken, at most `micro_batch` images each (None: one pass).

    A batch-norm group must lie inside one pass, since its statistics need all its images.

    Raises ValueError where no division does that.
    """
    share = -(-batch // ranks)
    if micro_batch is None or micro_batch >= share:
        return 1
    for count in range(-(-share // micro_batch), share + 1):
        if groups % (ranks * count) == 0:
            return count
    raise ValueError(
        f"a batch of {batch} on {ranks} workers cannot be taken in passes of at most {micro_batch} images: its "
        f"{groups} batch-norm group(s) of {batch // groups} would be cut; set model.batch_norm_group to at most "
        f"{micro_batch}, or leave the micro-batch out"
    )
