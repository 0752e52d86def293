"""Training step: n_dis discriminator updates, then one generator update. No other code trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sagan import batch_norm, moving_average, spectral_norm
from sagan.batch_norm import Groups
from sagan.learning_rate import learning_rate_factor
from sagan.losses import discriminator_hinge, generator_hinge
from sagan.random import Purpose, draw_labels, draw_latents
from sagan.ranks import World, on_device
from sagan.train_state import TrainState

METRICS = ("loss_d", "loss_g", "logit_real", "logit_fake", "gradient_d", "gradient_g")
"""Losses, mean logits, and the Euclidean norms of the gradients of both networks."""


class Step:
    """Training step of a state. `metrics = step(batches)` moves the state by n_dis × batch images.

    Seed and position determine latents and labels. A rank's loss is its local sum × ranks / batch. DDP takes the mean
    over ranks, which is then the mean over the global batch, for equal and unequal shares.

    Args:
        state: the state that each call changes.
        batch: size of the global batch, the same on any number of ranks.
        world: the ranks that train together; a world of one by default.
        precision: "float32" for the state's own dtype. "bf16" for autocast; statistics, σ, softmax and logits stay
            float32.
        micro_batch: largest number of real images of a rank that are in memory at once. Gradients add up to the same
            step. None for no limit.

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
        """Run one step and return this rank's part of each metric, float [len(METRICS)].

        The sum over ranks is the metric. With several discriminator updates, the discriminator's metrics belong to the
        last one. All ranks have the same gradients and return the same parts of their norms. Nothing is copied to the
        host.

        Args:
            batches: n_dis pairs of this rank's real images, [b, 3, H, W] in [−1, 1], and their labels, int64 [b]. An
                unconditional model ignores the labels.
        """
        state = self.state
        position = state.images
        for images, labels in batches:
            loss_d, logit_real, logit_fake, gradient_d = self._update_discriminator(position, images, labels)
            position += self.batch
        loss_g, gradient_g = self._update_generator(state.images)
        state.images = position
        decay = state.optim.ema_decay if position >= 1000 * state.optim.ema_start_kimg else 0.0
        moving_average.update(state.ema, state.generator, decay)
        return torch.stack([loss_d, loss_g, logit_real, logit_fake, gradient_d, gradient_g])

    def _update_discriminator(self, start: int, images: Tensor, labels: Tensor) -> Tensor:
        """Update the discriminator with the batch at position `start`.

        Returns this rank's parts of four metrics, [4]: the loss, the real logits and the logits of generated images,
        each summed over this rank's images and divided by the global batch size, and the norm of the gradient.
        """
        state = self.state
        metrics = torch.zeros(3, dtype=self.dtype, device=self.device)
        for pass_world in self._pass_worlds(self.discriminator):
            rows = self._rows(start, pass_world)
            real = images[rows]
            with torch.no_grad(), self._autocast():
                latents, fake_labels, groups = self._draw(start, pass_world, Purpose.Z_D, Purpose.Y_D)
                fake = state.generator(latents, fake_labels, groups)
            with self._autocast():
                both_labels = torch.cat([labels[rows], fake_labels]) if fake_labels is not None else None
                both = torch.cat([real.to(fake.dtype), fake]).contiguous(memory_format=torch.channels_last)
                logit_real, logit_fake = self.discriminator(both, both_labels).split([len(real), len(fake)])
            loss = discriminator_hinge(logit_real, logit_fake) / self.batch
            self._backward(loss)
            with torch.no_grad():
                metrics += torch.stack([loss, logit_real.sum() / self.batch, logit_fake.sum() / self.batch])
        gradient = self._descend(state.optimizer_d, state.optim.lr_d)
        spectral_norm.advance(state.discriminator, self.world)
        return torch.cat([metrics, gradient[None]])

    def _update_generator(self, start: int) -> tuple[Tensor, Tensor]:
        """Update the generator with the latents at position `start`.

        Returns this rank's parts of the loss and of the norm of the gradient.
        """
        state = self.state
        total_loss = torch.zeros((), dtype=self.dtype, device=self.device)
        statistics = []
        state.discriminator.requires_grad_(False)
        for pass_world in self._pass_worlds(self.generator):
            with self._autocast():
                latents, labels, groups = self._draw(start, pass_world, Purpose.Z_G, Purpose.Y_G)
                logits = state.discriminator(self.generator(latents, labels, groups), labels)
            loss = generator_hinge(logits) / self.batch
            self._backward(loss)
            total_loss += loss.detach()
            statistics.append(batch_norm.used(state.generator))
        state.discriminator.requires_grad_(True)
        gradient = self._descend(state.optimizer_g, state.optim.lr_g)
        spectral_norm.advance(state.generator, self.world)
        batch_norm.track(state.generator, torch.stack(statistics).mean(0), self.world)
        return total_loss, gradient

    # --- a pass ------------------------------------------------------------------------------------------------------

    def _pass_worlds(self, network: nn.Module) -> Iterator[World]:
        """Yield the world of each pass in turn. Ranks exchange gradients of `network` in the last pass only."""
        for number in range(self.passes):
            last = number == self.passes - 1
            defers = isinstance(network, DistributedDataParallel) and not last
            with network.no_sync() if defers else contextlib.nullcontext():  # type: ignore[operator]
                yield self.world if self.passes == 1 else self.world.part(number, self.passes)

    def _rows(self, start: int, pass_world: World) -> slice:
        """Return the indices of a pass's images in this rank's share of the batch at position `start`."""
        rank_share, pass_share = (world.share(start, start + self.batch) for world in (self.world, pass_world))
        return slice((pass_share.start - rank_share.start) // self.world.size, None, self.passes)

    def _draw(
        self, start: int, pass_world: World, latent_purpose: Purpose, label_purpose: Purpose
    ) -> tuple[Tensor, Tensor | None, Groups]:
        """Return latents, labels and batch-norm groups of a pass over the batch at position `start`.

        Latents are [b, z_dim] in the state's dtype. Labels are int64 [b], or None for an unconditional model.
        """
        model, seed = self.state.model, self.state.seed
        positions = pass_world.share(start, start + self.batch)
        latents = on_device(draw_latents(seed, latent_purpose, positions, model.z_dim), self.device, self.dtype)
        labels = (
            on_device(draw_labels(seed, label_purpose, positions, model.known_num_classes), self.device)
            if model.known_num_classes
            else None
        )
        return latents, labels, Groups(positions, self.groups, pass_world, self.device)

    def _backward(self, loss: Tensor) -> None:
        """Compute gradients. The factor cancels DDP's mean over ranks, so that losses of ranks add up."""
        (loss * self.world.size).backward()

    def _descend(self, optimizer: torch.optim.Adam, lr: float) -> Tensor:
        """Run one optimiser step at the learning rate of the state's position, and clear the gradients.

        Returns this rank's part of the norm of the gradient, which is the norm / ranks.
        """
        gradients = []
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate_factor(self.state.optim, self.state.images)
            gradients += [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        optimizer.step()
        optimizer.zero_grad()
        return norm.to(self.dtype) / self.world.size

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _distribute(self, network: nn.Module) -> nn.Module:
        """Return the network in DDP, or the network itself in a world of one.

        DDP does not synchronise buffers. `spectral_norm.advance` synchronises u, v and σ, and `batch_norm.track` the
        running averages.
        """
        if self.world.size == 1:
            return network
        return DistributedDataParallel(network, forward_sync_buffers=False, gradient_as_bucket_view=True)


def passes(batch: int, ranks: int, groups: int, micro_batch: int | None) -> int:
    """Return the number of passes in which each rank processes its share of a batch.

    A pass has at most `micro_batch` images. A batch-norm group must lie inside one pass, since its statistics need all
    its images.

    Args:
        batch: size of the global batch.
        ranks: number of ranks.
        groups: number of batch-norm groups in the global batch.
        micro_batch: largest number of images of a rank in one pass; None for one pass.

    Raises ValueError where no number of passes meets both conditions.
    """
    share = -(-batch // ranks)
    if micro_batch is None or micro_batch >= share:
        return 1
    for count in range(-(-share // micro_batch), share + 1):
        if groups % (ranks * count) == 0:
            return count
    raise ValueError(
        f"a batch of {batch} on {ranks} workers cannot be split into passes of at most {micro_batch} images: its "
        f"{groups} batch-norm group(s) of {batch // groups} images would be cut; set model.batch_norm_group to at most "
        f"{micro_batch}, or leave the micro-batch out"
    )
