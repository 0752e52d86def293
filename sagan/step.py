"""One training step, the only code that trains: n_dis discriminator updates, then one generator update."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sagan import batch_norm, ema, spectral_norm
from sagan.batch_norm import Groups
from sagan.losses import discriminator_hinge, generator_hinge
from sagan.random import Purpose, labels, latents
from sagan.state import TrainState
from sagan.world import World

METRICS = ("loss_d", "loss_g", "logit_real", "logit_fake")


class Step:
    """`metrics = step(batches)` moves a state by n_dis × batch images.

    Latents and labels come from (seed, position); losses are local sums × ranks / batch, so that DDP's mean over ranks
    is the mean over the global batch, whatever each rank's share.

    Args:
        batch: global batch, the same on any number of ranks.
        precision: "float32" (the state's own type) or "bf16" (autocast; statistics, σ, softmax, logits stay float32).
    """

    def __init__(self, state: TrainState, batch: int, world: World | None = None, precision: str = "float32") -> None:
        self.state, self.batch, self.precision = state, batch, precision
        self.world = World() if world is None else world
        self.device = next(state.generator.parameters()).device
        self.dtype = next(state.generator.parameters()).dtype
        self.groups = batch // (state.model.batch_norm_group or batch)
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

    def _update_discriminator(self, start: int, real: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.state
        with torch.no_grad(), self._autocast():
            z, y_fake, groups = self._draw(start, Purpose.Z_D, Purpose.Y_D)
            fake = state.generator(z, y_fake, groups)
        with self._autocast():
            both_y = torch.cat([y, y_fake]) if y_fake is not None else None
            both = torch.cat([real.to(fake.dtype), fake]).contiguous(memory_format=torch.channels_last)
            logit_real, logit_fake = self.discriminator(both, both_y).split([len(real), len(fake)])
        loss = discriminator_hinge(logit_real, logit_fake) / self.batch
        self._descend(loss, state.optimizer_d)
        spectral_norm.advance(state.discriminator, self.world)
        with torch.no_grad():
            return loss.detach(), logit_real.sum() / self.batch, logit_fake.sum() / self.batch

    def _update_generator(self, start: int) -> Tensor:
        state = self.state
        state.discriminator.requires_grad_(False)
        with self._autocast():
            z, y, groups = self._draw(start, Purpose.Z_G, Purpose.Y_G)
            logits = state.discriminator(self.generator(z, y, groups), y)
        loss = generator_hinge(logits) / self.batch
        self._descend(loss, state.optimizer_g)
        state.discriminator.requires_grad_(True)
        spectral_norm.advance(state.generator, self.world)
        batch_norm.track(state.generator, self.world)
        return loss.detach()

    def _draw(self, start: int, z: Purpose, y: Purpose) -> tuple[Tensor, Tensor | None, Groups]:
        """This rank's latents, labels and batch-norm groups of the batch that starts at `start`."""
        model, seed = self.state.model, self.state.seed
        positions = self.world.share(start, start + self.batch)
        rows = latents(seed, z, positions, model.z_dim).to(self.device, self.dtype)
        classes = labels(seed, y, positions, model.labels).to(self.device) if model.labels else None
        return rows, classes, Groups(positions, self.groups, self.world, self.device)

    def _descend(self, loss: Tensor, optimizer: torch.optim.Adam) -> None:
        optimizer.zero_grad()
        (loss * self.world.size).backward()
        optimizer.step()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _distribute(self, network: nn.Module) -> nn.Module:
        """DDP over the ranks. Buffers are never synchronised by it: u and the statistics have their own places."""
        if self.world.size == 1:
            return network
        return DistributedDataParallel(network, forward_sync_buffers=False, gradient_as_bucket_view=True)
