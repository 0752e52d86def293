"""Training step: n_dis discriminator updates, then one generator update. No other code trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sagan import batch_norm, diffaugment, moving_average, spectral_norm
from sagan.batch_norm import Groups
from sagan.config import Augmentation, passes
from sagan.device import on_device
from sagan.dropout import draw_masks
from sagan.learning_rate import learning_rate_factor
from sagan.losses import Loss, logits
from sagan.random import Purpose, draw_labels, draw_latents
from sagan.ranks import World
from sagan.step_graph import StepGraph, side_stream
from sagan.step_inputs import Draw, Inputs
from sagan.train_state import TrainState

METRICS = ("loss_d", "loss_g", "logit_real", "logit_fake", "gradient_d", "gradient_g")
"""Losses, mean logits, and the Euclidean norms of the gradients of both networks."""


@dataclass(frozen=True)
class _Streams:
    """Purposes of the random numbers of an update. `augmentation` and `masks` have one for each kind of D's images."""

    latents: Purpose
    labels: Purpose
    augmentation: tuple[Purpose, ...]
    masks: tuple[Purpose, ...]


_OF_D = _Streams(
    Purpose.Z_D, Purpose.Y_D, (Purpose.AUGMENT_REAL, Purpose.AUGMENT_D), (Purpose.DROP_REAL, Purpose.DROP_D)
)
_OF_G = _Streams(Purpose.Z_G, Purpose.Y_G, (Purpose.AUGMENT_G,), (Purpose.DROP_G,))


class Step:
    """Training step of a state. `metrics = step(batches)` moves the state by n_dis × batch images.

    Seed and position determine latents, labels and the parameters of the augmentation. A rank's loss is its local sum ×
    ranks / batch. DDP takes the mean over ranks, which is then the mean over the global batch, for equal and unequal
    shares.

    Args:
        state: the state that each call changes.
        batch: size of the global batch, the same on any number of ranks.
        world: the ranks that train together; a world of one by default.
        precision: "float32" for the state's own dtype. "bf16" for autocast; statistics, σ, softmax and logits stay
            float32.
        micro_batch: largest number of real images of a rank that are in memory at once. Gradients add up to the same
            step. None for no limit.
        augment: "diffaugment" to change all images that the discriminator gets, real and generated ones, in both
            updates (see `sagan.diffaugment`). None for no changes.

    Raises ValueError where a batch cannot be accumulated exactly (see `sagan.config.passes`), and where `augment` is
    unknown.
    """

    def __init__(
        self,
        state: TrainState,
        batch: int,
        world: World | None = None,
        precision: str = "float32",
        micro_batch: int | None = None,
        augment: Augmentation | None = None,
    ) -> None:
        if augment not in (None, *get_args(Augmentation)):
            raise ValueError(f"augment is {augment!r}; it must be None or one of {get_args(Augmentation)}")
        self.state, self.batch, self.precision, self.augment = state, batch, precision, augment
        self.world = (World() if world is None else world).joined()
        self.device = next(state.generator.parameters()).device
        self.dtype = next(state.generator.parameters()).dtype
        self.loss = Loss(state.optim.loss, state.optim.auxiliary_weight)
        self.norm_d = bool(batch_norm.layers(state.discriminator))
        self.groups = batch // (state.model.batch_norm_group or batch)
        self.passes = passes(batch, self.world.size, self.groups, micro_batch)
        self.generator = self._distribute(state.generator)
        self.discriminator = self._distribute(state.discriminator)
        if self.world.size > 1:
            self._fix_bucket_layout()
        optimizers = (state.optimizer_d, state.optimizer_g)
        self.graph = StepGraph(self._compute, optimizers) if StepGraph.serves(self.device, self.world, batch) else None

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
        inputs = self._inputs(batches)
        self._set_learning_rates()
        end = state.images + len(inputs.real) * self.batch
        decay = state.optim.ema_decay if end >= 1000 * state.optim.ema_start_kimg else 0.0
        metrics = self._compute(inputs, decay) if self.graph is None else self.graph(inputs, decay)
        state.images = end
        return metrics

    def _inputs(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Inputs:
        """Draw everything that is random in the next step."""
        start, real = self.state.images, list(batches)
        updates = range(start, start + len(real) * self.batch, self.batch)
        draws_d = [self._draws(position, _OF_D) for position in updates]
        return Inputs(real, draws_d, self._draws(start, _OF_G))

    def _set_learning_rates(self) -> None:
        """Give both optimisers the learning rate of the state's position."""
        optim = self.state.optim
        factor = learning_rate_factor(optim, self.state.images)
        for optimizer, lr in ((self.state.optimizer_d, optim.lr_d), (self.state.optimizer_g, optim.lr_g)):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # a recorded step reads it
                    group["lr"].fill_(lr * factor)
                else:
                    group["lr"] = lr * factor

    def _compute(self, inputs: Inputs, ema_decay: float) -> Tensor:
        """Update both networks and the moving average. Return this rank's parts of the metrics, [len(METRICS)]."""
        for (images, labels), draws in zip(inputs.real, inputs.draws_d, strict=True):
            loss_d, logit_real, logit_fake, gradient_d = self._update_discriminator(images, labels, draws)
        loss_g, gradient_g = self._update_generator(inputs.draws_g)
        moving_average.update(self.state.ema, self.state.generator, ema_decay)
        return torch.stack([loss_d, loss_g, logit_real, logit_fake, gradient_d, gradient_g])

    def _update_discriminator(self, images: Tensor, labels: Tensor, draws: list[Draw]) -> Tensor:
        """Update the discriminator with this rank's real images and with generated images.

        Returns this rank's parts of four metrics, [4]: the loss, the real logits and the logits of generated images,
        each summed over this rank's images and divided by the global batch size, and the norm of the gradient.
        """
        state = self.state
        metrics, statistics = self._backward_discriminator(images, labels, draws)
        gradient = self._descend(state.optimizer_d)
        spectral_norm.advance(state.discriminator, self.world)
        if self.norm_d:
            batch_norm.track(state.discriminator, torch.stack(statistics).mean(0), self.world)
        return torch.cat([metrics, gradient[None]])

    def _update_generator(self, draws: list[Draw]) -> tuple[Tensor, Tensor]:
        """Update the generator.

        Returns this rank's parts of the loss and of the norm of the gradient.
        """
        state = self.state
        loss, statistics = self._backward_generator(draws)
        gradient = self._descend(state.optimizer_g)
        spectral_norm.advance(state.generator, self.world)
        batch_norm.track(state.generator, torch.stack(statistics).mean(0), self.world)
        return loss, gradient

    # --- gradients ---------------------------------------------------------------------------------------------------

    def _backward_discriminator(self, images: Tensor, labels: Tensor, draws: list[Draw]) -> tuple[Tensor, list[Tensor]]:
        """Compute the discriminator's gradients.

        Returns this rank's parts of the loss and of both mean logits, [3], and each pass's batch statistics.
        """
        metrics = torch.zeros(3, dtype=self.dtype, device=self.device)
        statistics = []
        for draw in self._passes(self.discriminator, draws):
            real = images[draw.rows]
            with torch.no_grad(), self._autocast():
                fake = self.state.generator(draw.latents, draw.labels, draw.groups)
            with self._autocast():
                both_labels = torch.cat([labels[draw.rows], draw.labels]) if draw.labels is not None else None
                both = self._augmented(torch.cat([real.to(fake.dtype), fake]), draw)
                both = both.contiguous(memory_format=torch.channels_last)
                # Real and generated images are normalised apart.
                groups_d = draw.groups.twice() if self.norm_d else None
                outputs = self.discriminator(both, both_labels, groups_d, draw.masks).split([len(real), len(fake)])
            loss = self.loss.discriminator(*outputs) / self.batch
            self._backward(loss)
            with torch.no_grad():
                metrics += torch.stack([loss, *(logits(output).sum() / self.batch for output in outputs)])
            if self.norm_d:
                statistics.append(batch_norm.used(self.state.discriminator))
        return metrics, statistics

    def _backward_generator(self, draws: list[Draw]) -> tuple[Tensor, list[Tensor]]:
        """Compute the generator's gradients. Return this rank's part of the loss, and each pass's batch statistics."""
        total_loss = torch.zeros((), dtype=self.dtype, device=self.device)
        statistics = []
        with _frozen(self.state.discriminator):
            for draw in self._passes(self.generator, draws):
                with self._autocast():
                    images = self.generator(draw.latents, draw.labels, draw.groups)
                    augmented = self._augmented(images, draw)
                    output = self.state.discriminator(augmented, draw.labels, draw.groups, draw.masks)
                loss = self.loss.generator(output) / self.batch
                self._backward(loss)
                total_loss += loss.detach()
                statistics.append(batch_norm.used(self.state.generator))
        return total_loss, statistics

    def _fix_bucket_layout(self) -> None:
        """Let DDP lay out its buckets now: compute gradients of both networks for black images, and drop them.

        DDP lays out its buckets anew after its first backward pass. Where a gradient lies in a bucket decides in which
        order three or more ranks are summed. Without this pass, the first step of a process would round differently
        from the same step of a process that trains on.
        """
        start, size = self.state.images, self.state.model.known_resolution
        share = len(self.world.share(start, start + self.batch))
        black = torch.full((share, 3, size, size), -1.0, dtype=self.dtype, device=self.device)
        inputs = self._inputs([(black, torch.zeros(share, dtype=torch.int64, device=self.device))])
        self._backward_discriminator(*inputs.real[0], inputs.draws_d[0])
        self._backward_generator(inputs.draws_g)
        for optimizer in (self.state.optimizer_d, self.state.optimizer_g):
            optimizer.zero_grad()

    # --- a pass ------------------------------------------------------------------------------------------------------

    def _passes(self, network: nn.Module, draws: list[Draw]) -> Iterator[Draw]:
        """Yield the draw of each pass in turn. Ranks exchange gradients of `network` in the last pass only."""
        for draw in draws:
            defers = isinstance(network, DistributedDataParallel) and draw is not draws[-1]
            with network.no_sync() if defers else contextlib.nullcontext():  # type: ignore[operator]
                yield draw

    def _augmented(self, images: Tensor, draw: Draw) -> Tensor:
        """Return images as the discriminator gets them in a pass."""
        return images if draw.augmentation is None else diffaugment.augment(images, draw.augmentation)

    def _draws(self, start: int, streams: _Streams) -> list[Draw]:
        """Return the draws of all passes over the batch at position `start`."""
        worlds = [self.world.part(number, self.passes) for number in range(self.passes)]
        if self.passes == 1:
            worlds = [self.world]
        return [self._draw(start, pass_world, streams) for pass_world in worlds]

    def _draw(self, start: int, pass_world: World, streams: _Streams) -> Draw:
        """Return the draw of a pass over the batch at position `start`."""
        model, seed = self.state.model, self.state.seed
        rank_share, positions = (world.share(start, start + self.batch) for world in (self.world, pass_world))
        latents = on_device(draw_latents(seed, streams.latents, positions, model.z_dim), self.device, self.dtype)
        labels = (
            on_device(draw_labels(seed, streams.labels, positions, model.known_num_classes), self.device)
            if model.known_num_classes
            else None
        )
        augmentation = self._draw_augmentation(positions, streams.augmentation) if self.augment is not None else None
        masks = self._draw_masks(positions, streams.masks) if self.state.discriminator.dropped else None
        rows = slice((positions.start - rank_share.start) // self.world.size, None, self.passes)
        return Draw(rows, latents, labels, Groups(positions, self.groups, pass_world, self.device), augmentation, masks)

    def _draw_augmentation(self, positions: range, purposes: tuple[Purpose, ...]) -> Tensor:
        """Return the parameters of the changes of images at `positions`, for one purpose after the other."""
        seed, size = self.state.seed, self.state.model.known_resolution
        parameters = [diffaugment.draw_parameters(seed, purpose, positions, size) for purpose in purposes]
        return on_device(torch.cat(parameters), self.device, self.dtype)

    def _draw_masks(self, positions: range, purposes: tuple[Purpose, ...]) -> Tensor:
        """Return the masks of dropout for images at `positions`, for one purpose after the other."""
        dropped = self.state.discriminator.dropped
        masks = [draw_masks(self.state.seed, purpose, positions, dropped) for purpose in purposes]
        return on_device(torch.cat(masks), self.device)

    def _backward(self, loss: Tensor) -> None:
        """Compute gradients. The factor cancels DDP's mean over ranks, so that losses of ranks add up."""
        (loss * self.world.size).backward()

    def _descend(self, optimizer: torch.optim.Adam) -> Tensor:
        """Run one optimiser step, and clear the gradients.

        Returns this rank's part of the norm of the gradient, which is the norm / ranks.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        optimizer.step()
        optimizer.zero_grad()
        return norm.to(self.dtype) / self.world.size

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _distribute(self, network: nn.Module) -> nn.Module:
        """Return the network in DDP, or the network itself in a world of one.

        DDP does not synchronise buffers. `spectral_norm.advance` synchronises u, v and σ, and `batch_norm.track` the
        running averages. Buckets of 100 MB take two collectives for each network's gradients.
        """
        if self.world.size == 1:
            return network
        with side_stream(self.device):
            return DistributedDataParallel(
                network, forward_sync_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=100
            )


@contextlib.contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Compute no gradients with respect to the parameters of a network."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
