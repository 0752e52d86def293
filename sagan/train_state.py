"""Training state: everything that a training step reads and changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sagan import moving_average, spectral_norm
from sagan.config import ModelConfig, OptimConfig
from sagan.device import on_host
from sagan.discriminator import Discriminator
from sagan.generator import Generator

FORMAT = 3
TENSORS, FACTS = "state.safetensors", "state.json"
UNUSABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError)
"""Errors that Python and torch raise where a network is built from values of wrong types."""


@dataclass(frozen=True)
class SavedState:
    """A training state as it is written to a file."""

    images: int
    """Position of the run."""
    facts: dict[str, Any]
    """Contents of state.json."""
    tensors: dict[str, Tensor]
    """Contents of state.safetensors, on the host."""

    def save(self, folder: Path | str) -> None:
        """Write state.safetensors and state.json into an existing folder."""
        save_file(self.tensors, Path(folder) / TENSORS)
        (Path(folder) / FACTS).write_text(json.dumps(self.facts, indent=1, sort_keys=True))


@dataclass(frozen=True)
class Facts:
    """The values of a stored state that are not tensors.

    Attributes:
        model: configuration of the networks.
        optim: configuration of the optimisers and of the moving average.
        seed: seed of the run.
        images: position of the run.
    """

    model: ModelConfig
    optim: OptimConfig
    seed: int
    images: int

    @classmethod
    def load(cls, folder: Path) -> Facts:
        """Read the state.json of a folder that somebody else may have written.

        Raises FileNotFoundError where it is missing, and ValueError where its format is not the format of this version
        or it describes no state.
        """
        try:
            facts = json.loads((folder / FACTS).read_text())
            if facts["format"] != FORMAT:
                raise ValueError(f"it has format {facts['format']}; this version reads format {FORMAT}")
            model, optim = ModelConfig.from_dict(facts["model"]), OptimConfig(**facts["optim"])
            _shapes(model)
            return cls(model, optim, *(_whole(facts[name], name) for name in ("seed", "images")))
        except KeyError as error:
            raise ValueError(f"{folder / FACTS} has no entry {error}") from error
        except UNUSABLE as error:
            raise ValueError(f"{folder / FACTS}: {error}") from error


class TrainState:
    """State of a run: both networks, both optimisers, the moving average, the position and the seed.

    The networks include u, v and the running averages of batch norm. The state does not depend on ranks, storage or
    data, and any number of workers can load it. Nothing in it is pickled.

    Args:
        model: configuration of the networks.
        optim: configuration of the optimisers and of the moving average.
        seed: seed of the initial weights, and of the latents and labels of a run.
        device: device of all tensors.

    Attributes:
        images: position of the run: the number of real images that the discriminator received in completed steps, over
            all workers.
        ema: exponential moving average of the generator's parameters, by name.
    """

    def __init__(self, model: ModelConfig, optim: OptimConfig, seed: int, device: torch.device | str = "cpu") -> None:
        """Create a new state.

        The weights are Glorot-uniform, or normal where `model.init_std` is given. u and v are converged on them, unless
        `model.spectral_norm_start` is "cold".
        """
        self.model, self.optim, self.seed, self.images = model, optim, seed, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = Generator(model)
            self.discriminator = Discriminator(model)
            if model.init_std is not None:
                for network in self._networks.values():
                    _draw_normal(network, model.init_std)
        for network in self._networks.values():
            network.to(device)
        self._start_spectral_norm()
        self._restart_optimizers()
        self.ema = moving_average.copy_of(self.generator)

    @property
    def _networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    @property
    def _optimizers(self) -> dict[str, tuple[nn.Module, torch.optim.Adam]]:
        return {
            "adam_g": (self.generator, self.optimizer_g),
            "adam_d": (self.discriminator, self.optimizer_d),
        }

    def _restart_optimizers(self) -> None:
        """Replace both optimisers by new ones without moments."""

        def adam(network: nn.Module, lr: float) -> torch.optim.Adam:
            betas = (self.optim.beta1, self.optim.beta2)
            return torch.optim.Adam(network.parameters(), lr=lr, betas=betas, eps=self.optim.eps, fused=True)

        self.optimizer_g = adam(self.generator, self.optim.lr_g)
        self.optimizer_d = adam(self.discriminator, self.optim.lr_d)

    def to(self, dtype: torch.dtype) -> TrainState:
        """Convert the state to another floating-point dtype, and return it.

        The optimisers and spectral norm restart. Exactness tests in float64 use this.
        """
        for network in self._networks.values():
            network.to(dtype)
        self._restart_optimizers()
        self.ema = {name: tensor.to(dtype) for name, tensor in self.ema.items()}
        self._start_spectral_norm()
        return self

    def _start_spectral_norm(self) -> None:
        """Run the power iterations that precede the first step."""
        iterations = 1 if self.model.spectral_norm_start == "cold" else spectral_norm.WARM_UP_ITERATIONS
        for network in self._networks.values():
            spectral_norm.warm_up(network, iterations)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the state with a unique name."""
        for prefix, network in self._networks.items():
            for name, tensor in network.state_dict().items():
                yield f"{prefix}.{name}", tensor
        for name, tensor in self.ema.items():
            yield f"ema.{name}", tensor
        for prefix, (network, optimizer) in self._optimizers.items():
            for name, parameter in network.named_parameters():
                for moment, tensor in optimizer.state.get(parameter, {}).items():
                    yield f"{prefix}.{name}.{moment}", tensor

    def facts(self) -> dict[str, Any]:
        """Return the values of the state that are not tensors, as in state.json."""
        return {
            "format": FORMAT,
            "images": self.images,
            "seed": self.seed,
            "model": self.model.to_dict(),
            "optim": self.optim.to_dict(),
        }

    def save(self, folder: Path | str) -> None:
        """Write state.safetensors and state.json into an existing folder."""
        SavedState(self.images, self.facts(), on_host(self._detached())).save(folder)

    def copied(self) -> SavedState:
        """Return a copy on the host, which another thread can write while steps go on. The host waits once."""
        copies = {
            name: tensor.clone(memory_format=torch.contiguous_format) if tensor.device.type == "cpu" else tensor
            for name, tensor in self._detached().items()
        }
        return SavedState(self.images, self.facts(), on_host(copies))

    def _detached(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.tensors()}

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> TrainState:
        """Return the state that `save` wrote, on `device`.

        Somebody else may have written the folder. Memory is allocated only after the tensors have the shapes that the
        configuration describes. Raises FileNotFoundError where a file is missing, and ValueError where the format is
        not the format of this version or a file is damaged.
        """
        folder = Path(folder)
        facts = Facts.load(folder)
        shapes, moments = _shapes(facts.model)
        try:
            tensors = load_file(folder / TENSORS)
        except SafetensorError as error:
            raise ValueError(f"{folder / TENSORS} is damaged: {error}") from error
        for of_parameter in moments:
            if of_parameter.keys() & tensors.keys():
                shapes |= of_parameter
        given = {name: tensor.shape for name, tensor in tensors.items() if tensor.is_floating_point()}
        if wrong := sorted(name for name in shapes.keys() | tensors.keys() if given.get(name) != shapes.get(name)):
            raise ValueError(f"{folder / TENSORS}: {wrong[0]!r:.200} is not as {FACTS} describes it")
        state = cls(facts.model, facts.optim, facts.seed, device)
        state.images = facts.images
        state.assign(tensors)
        return state

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all tensors of the state by those of the same names, and recompute σ.

        A parameter whose moments are not in `tensors` keeps its own. Raises KeyError where another tensor is missing.
        """
        for prefix, network in self._networks.items():
            network.load_state_dict({name: tensors[f"{prefix}.{name}"] for name in network.state_dict()})
            spectral_norm.refresh(network)
        for name, tensor in self.ema.items():
            tensor.copy_(tensors[f"ema.{name}"])
        for prefix, (network, optimizer) in self._optimizers.items():
            for name, parameter in network.named_parameters():
                key = f"{prefix}.{name}"
                if f"{key}.step" in tensors:
                    optimizer.state[parameter] = {
                        "step": tensors[f"{key}.step"].to(parameter.device),
                        "exp_avg": torch.empty_like(parameter).copy_(tensors[f"{key}.exp_avg"]),
                        "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"{key}.exp_avg_sq"]),
                    }


@torch.no_grad()
def _draw_normal(network: nn.Module, std: float) -> None:
    """Replace the weights of all layers by values of N(0, std²). Batch norm and the biases keep theirs."""
    for module in network.modules():
        if isinstance(module, spectral_norm.SpectralNorm):
            nn.init.normal_(module.weight, 0.0, std)


def _shapes(model: ModelConfig) -> tuple[dict[str, torch.Size], list[dict[str, torch.Size]]]:
    """Return the shapes of the tensors of a new state, and of the moments of each parameter after the first step."""
    with torch.device("meta"):
        networks = {"generator": Generator(model), "discriminator": Discriminator(model)}
    shapes = {f"{prefix}.{n}": t.shape for prefix, network in networks.items() for n, t in network.state_dict().items()}
    shapes |= {f"ema.{name}": parameter.shape for name, parameter in networks["generator"].named_parameters()}
    moments = []
    for prefix, network in (("adam_g", networks["generator"]), ("adam_d", networks["discriminator"])):
        for name, parameter in network.named_parameters():
            key = f"{prefix}.{name}"
            kinds = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            moments.append({f"{key}.{kind}": shape for kind, shape in kinds.items()})
    return shapes, moments


def _whole(value: object, name: str) -> int:
    """Return a number of a stored state. Raises ValueError where it is not an integer from 0 to 2**63 − 1."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{name} must be an integer from 0 to 2**63 - 1")
    return value
