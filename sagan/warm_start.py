"""Warm start: a new state whose networks start from the tensors of an earlier one.

The tables of classes, which have one row per class, are those of conditional batch norm, of the projection and of the
classifier. Where the classes differ, a class takes the row of the class of its name, and any other class takes the mean
of all rows. A network without classes counts as one with a single row. All other tensors are taken bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sagan import batch_norm, spectral_norm
from sagan.batch_norm import ConditionalBatchNorm
from sagan.config import ModelConfig, OptimConfig
from sagan.discriminator import Discriminator
from sagan.generator import Generator
from sagan.train_state import TrainState
from sagan.trained_model import Model

Network = Literal["generator", "discriminator"]
_ADAM: dict[Network, str] = {"generator": "adam_g", "discriminator": "adam_d"}
_OF_PARAMETER = ("", ".step", ".exp_avg", ".exp_avg_sq")  # of a moving average, and of Adam
# Thirty iterations from a random u leave 0.2 % of σ, which every layer of a finished generator would add to its images.
_ITERATIONS = 10 * spectral_norm.WARM_UP_ITERATIONS
_MOST_NAMES = 10  # names of classes in a line


@dataclass(frozen=True)
class Source:
    """What a source is, without its tensors.

    Attributes:
        model: configuration of its networks.
        class_names: names of its classes by label; empty where they have no names.
        finished: whether it is a finished generator, whose weights are divided by σ, and not a training state.
        images: position of the training state; 0 for a finished generator.
    """

    model: ModelConfig
    class_names: Sequence[str] = ()
    finished: bool = False
    images: int = 0


@dataclass(frozen=True)
class Choice:
    """What is taken from a source.

    Attributes:
        networks: one network, or all that the source has.
        optimizers: whether the moments of Adam are taken, for the networks that are taken.
        ema: whether the moving average is taken. None takes it where the source has one and the new run uses it.
        keep_position: whether the new state is at the position of the source, and not at position 0.
    """

    networks: Literal["all"] | Network = "all"
    optimizers: bool = False
    ema: bool | None = None
    keep_position: bool = False


@dataclass(frozen=True)
class WarmStart:
    """Decision about what a new state takes from a source. It does not depend on tensors.

    Attributes:
        source: the source.
        model: configuration of the new networks.
        optim: configuration of the new optimisers and of the new moving average.
        networks: the networks that are taken.
        rows: for each row of a new class table, the row of the source's table, or None for the mean of its rows. None
            where the classes are the same.
        optimizers: whether the moments of Adam are taken.
        ema: whether the moving average is taken.
        images: position of the new state.
        taken: one line for each part that is taken.
        skipped: one line for each part of the source that is not taken, or of the new state that starts anew.
    """

    source: Source
    model: ModelConfig
    optim: OptimConfig
    networks: tuple[Network, ...]
    rows: tuple[int | None, ...] | None
    optimizers: bool
    ema: bool
    images: int
    taken: tuple[str, ...]
    skipped: tuple[str, ...]

    @classmethod
    def plan(
        cls, source: Source, model: ModelConfig, optim: OptimConfig, class_names: Sequence[str], choice: Choice
    ) -> WarmStart:
        """Decide what a new state takes.

        Args:
            source: what the source is.
            model: configuration of the new networks, with resolution and number of classes.
            optim: configuration of the new optimisers and of the new moving average.
            class_names: names of the new classes by label; empty where they have no names.
            choice: what is to be taken.

        Raises ValueError where the networks differ in anything but their classes; the message has both values. Raises
        it too where the choice names something that the source does not have.
        """
        networks = _networks(source, choice)
        _require_same_structure(source, model, networks)
        if choice.optimizers and not source.images:
            raise ValueError("the source has no moments of Adam: it is not the state of a run after its first step")
        if choice.keep_position and not source.images:
            raise ValueError("the source has no position: it is not the state of a run after its first step")
        has_ema = not source.finished and "generator" in networks
        if choice.ema and not has_ema:
            raise ValueError("no moving average can be taken: it needs a training state and its generator")
        images = source.images if choice.keep_position else 0
        starts_anew = images < 1000 * optim.ema_start_kimg
        if choice.ema and starts_anew:
            raise ValueError(
                f"optim.ema_start_kimg is {optim.ema_start_kimg:g}: until then the moving average is a copy of the "
                "weights, and one that is taken would be lost"
            )
        ema = has_ema and not starts_anew if choice.ema is None else choice.ema
        rows = _rows(source, model, class_names)
        taken, skipped = [], []
        for network in _ADAM:
            if network in networks:
                parts = _Parts(network, source, model, rows)
                taken += parts.taken(class_names)
                skipped += parts.skipped()
            else:
                lacks = source.finished and network == "discriminator"
                skipped.append(f"{network}: {'the source has none' if lacks else 'not asked for'}; its weights are new")
        if ema:
            taken.append("moving average")
        elif "generator" in networks:
            skipped.append("moving average: it starts as a copy of the generator's weights")
        moments = f"moments of Adam: {' and '.join(networks)}"
        (taken if choice.optimizers else skipped).append(moments if choice.optimizers else "moments of Adam: new")
        if rows is not None and (left := sorted(set(range(len(source.class_names))) - set(rows))):
            skipped.append(f"classes that only the source has: {_listed([source.class_names[i] for i in left])}")
        if choice.keep_position:
            taken.append(f"position: {images / 1000:g} kimg")
        own = "seed, order of images, latents and labels: the run has its own"
        skipped.append(own if choice.keep_position else f"position, {own}")
        return cls(source, model, optim, networks, rows, choice.optimizers, ema, images, tuple(taken), tuple(skipped))

    def state(self, tensors: Mapping[str, Tensor], seed: int) -> TrainState:
        """Return the new state, on the host.

        Spectral norm divides a new class table by the table's own σ. u and v of such a layer, and those of a finished
        generator, are converged on the weights. All other vectors are taken.

        Args:
            tensors: tensors of the source, as `tensors_of` returns them.
            seed: seed of the new run. It decides the weights that are not taken.
        """
        state = TrainState(self.model, self.optim, seed)
        new = dict(state.tensors())
        stale = []
        for network in self.networks:
            module: nn.Module = getattr(state, network)
            tables = _Parts(network, self.source, self.model, self.rows).tables
            for name in module.state_dict():
                if f"{network}.{name}" in tensors and not _is_vector(name):
                    new[f"{network}.{name}"] = self._converted(tensors[f"{network}.{name}"], name in tables)
            for name, layer in spectral_norm.layers(module):
                vectors = [f"{network}.{name}.{vector}" for vector in layer.state_dict() if _is_vector(vector)]
                if f"{name}.weight" not in tables and all(vector in tensors for vector in vectors):
                    new |= {vector: tensors[vector] for vector in vectors}
                elif f"{network}.{name}.weight" in tensors:
                    stale.append(layer)
            prefixes = ["ema"] * (self.ema and network == "generator") + [_ADAM[network]] * self.optimizers
            for name, _ in module.named_parameters():
                for key in (f"{prefix}.{name}{kind}" for prefix in prefixes for kind in _OF_PARAMETER):
                    if key in tensors:
                        new[key] = self._converted(tensors[key], name in tables and not key.endswith(".step"))
        if not self.ema:
            new |= {f"ema.{name}": new[f"generator.{name}"] for name in state.ema}
        state.assign(new)
        state.images = self.images
        for layer in stale:
            spectral_norm.warm_up(layer, _ITERATIONS)
        return state

    def _converted(self, tensor: Tensor, is_table: bool) -> Tensor:
        """Return a tensor of the source as the new state has it."""
        if not is_table:
            return tensor
        assert self.rows is not None
        table = tensor if self.source.model.known_num_classes else tensor[None]
        mean = table.mean(0, keepdim=True, dtype=torch.float64).to(table.dtype)
        rows = torch.tensor([len(table) if row is None else row for row in self.rows])
        result = torch.cat([table, mean])[rows]
        return result if self.model.known_num_classes else result[0]


def tensors_of(source: TrainState | Model) -> dict[str, Tensor]:
    """Return the tensors of a training state or of a finished generator, as `WarmStart.state` takes them."""
    if isinstance(source, TrainState):
        return dict(source.tensors())
    return {f"generator.{name}": tensor for name, tensor in source.generator.state_dict().items()}


def _networks(source: Source, choice: Choice) -> tuple[Network, ...]:
    """Return the networks that are taken. Raises ValueError where the source does not have one."""
    if choice.networks == "discriminator" and source.finished:
        raise ValueError("the source is a finished generator and has no discriminator")
    if choice.networks != "all":
        return (choice.networks,)
    return ("generator",) if source.finished else ("generator", "discriminator")


def _require_same_structure(source: Source, model: ModelConfig, networks: Sequence[Network]) -> None:
    """Raise ValueError, with the values that differ, where the layers of the networks differ in more than classes."""
    ignored = set()
    if source.finished:
        ignored.add("model.spectral_norm_g")
    if not source.model.attention_sizes:
        ignored.add("model.attention_form")
    if not (source.model.known_num_classes and model.known_num_classes):
        ignored.add("model.condition_d")
    theirs, ours = ([_form(m), *(_layers(network, m) for network in networks)] for m in (source.model, model))
    for old, new in zip(theirs, ours, strict=True):
        keys = sorted(key for key in old.keys() - ignored if old[key] != new[key])
        if keys:  # the other values depend on the first
            differ = (f"{key}: {old[key]!s:.200} in the source, {new[key]} here" for key in keys)
            raise ValueError("; ".join(differ))


def _form(model: ModelConfig) -> dict[str, Any]:
    return {"model.resolution": model.known_resolution, "model.architecture": model.architecture}


def _layers(network: Network, model: ModelConfig) -> dict[str, Any]:
    """Return the values of a configuration, by key, that decide what the layers of a network compute."""
    attention = {"model.attention": list(model.attention_sizes), "model.attention_form": model.attention_form}
    if network == "generator":
        return attention | {
            "model.z_dim": model.z_dim,
            "model.channels_g times model.multipliers_g": model.widths_g,
            "model.slope_g": model.slope_g,
            "model.spectral_norm_g": model.spectral_norm_g,
        }
    return attention | {
        "model.channels_d times model.multipliers_d": [width for width, _ in model.widths_d],
        "model.slope_d": model.slope_d,
        "model.thin_d": model.thin_d,
        "model.spectral_norm_d": model.spectral_norm_d,
        "model.condition_d": model.condition_d,
    }


def _rows(source: Source, model: ModelConfig, class_names: Sequence[str]) -> tuple[int | None, ...] | None:
    """Return `WarmStart.rows`. Classes without names are the same where their numbers are equal."""
    theirs, ours = source.model.known_num_classes, model.known_num_classes
    names = list(class_names) if ours else []
    if theirs == ours and (not names or not source.class_names or names == list(source.class_names)):
        return None
    known = {name: row for row, name in enumerate(source.class_names)}
    return tuple(known.get(name) for name in names) if names else (None,) * max(1, ours)


def _on_meta(network: Network, model: ModelConfig) -> nn.Module:
    """Return a network that has shapes and takes no memory."""
    with torch.device("meta"):
        return Generator(model) if network == "generator" else Discriminator(model)


def _class_tables(network: nn.Module) -> set[str]:
    """Return the names of the parameters that have a row per class."""
    norms = [name for name, layer in network.named_modules() if isinstance(layer, ConditionalBatchNorm)]
    names = {f"{name}.{parameter}" for name in norms for parameter in ("weight", "bias")}
    return names | {name for name, _ in network.named_parameters() if name.startswith(("embedding.", "classifier."))}


def _is_vector(name: str) -> bool:
    """Return whether a tensor of a network is a vector of the power iteration."""
    return name.rpartition(".")[2] in ("u", "v", "u_before")


class _Parts:
    """The parts of a network that a new state takes.

    Attributes:
        tables: names of the parameters whose rows belong to other classes than in the source.
    """

    def __init__(self, network: Network, source: Source, model: ModelConfig, rows: Sequence[int | None] | None) -> None:
        self._network, self._source, self._model, self._rows = network, source, model, rows
        old, self._new = (_on_meta(network, m) for m in (source.model, model))
        self.tables = _class_tables(old) | _class_tables(self._new) if rows is not None else set()
        self._theirs, self._ours = (dict(module.named_parameters()) for module in (old, self._new))

    def taken(self, class_names: Sequence[str]) -> list[str]:
        """Return the lines about what is taken."""
        common = self._theirs.keys() & self._ours.keys()
        count = sum(self._ours[name].numel() for name in common - self.tables)
        lines = [f"{self._network}: {count:,} parameters{', divided by σ' if self._source.finished else ''}"]
        if batch_norm.layers(self._new):
            lines[0] += ", and the running averages of batch norm"
        if tables := common & self.tables:
            lines.append(f"{self._network}: {len(tables)} tables of classes, with {self._described(class_names)}")
        return lines

    def _described(self, class_names: Sequence[str]) -> str:
        """Describe the rows of a table."""
        assert self._rows is not None
        names = class_names if class_names and self._model.known_num_classes else list(map(str, range(len(self._rows))))
        named = [name for name, row in zip(names, self._rows, strict=True) if row is not None]
        others = [name for name, row in zip(names, self._rows, strict=True) if row is None]
        parts = [f"the row of the same name for {_listed(named)}"] if named else []
        if others:
            whom = _listed(others) if self._model.known_num_classes else "all images"
            count = self._source.model.known_num_classes
            parts.append(f"the mean of the {count:,} rows for {whom}" if count else f"the only row for {whom}")
        return ", and ".join(parts)

    def skipped(self) -> list[str]:
        """Return the lines about what only the source or only the new network has, and about what is computed anew."""
        fresh = [f"{name}.weight" for name, _ in spectral_norm.layers(self._new)]
        fresh = [name for name in fresh if name in self._theirs.keys() & self.tables]
        lines = [
            f"{name} of the source: the network has no classes" for name in self._theirs.keys() - self._ours.keys()
        ]
        lines += [f"{name}: new, because the source has none" for name in self._ours.keys() - self._theirs.keys()]
        lines += [f"u, v and σ of {name}: converged on its new rows" for name in fresh]
        if self._source.finished and self._model.spectral_norm_g:
            lines.append("u, v and σ: converged on the weights")
        return [f"{self._network}: {line}" for line in sorted(lines)]


def _listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(name[:40] for name in names[:_MOST_NAMES]) + more
