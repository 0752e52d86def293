"""One object that owns everything a step reads and changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sagan import ema, spectral_norm
from sagan.config import ModelConfig, OptimConfig
from sagan.discriminator import Discriminator
from sagan.generator import Generator

FORMAT = 2
TENSORS, FACTS = "state.safetensors", "state.json"


class TrainState:
    """Both networks with their u vectors and running statistics, both optimisers, the average, position and seed.

    It knows nothing of ranks, storage or data, and moves to any number of workers. Nothing in it is pickled.

    Attributes:
        images: position of the run: real images the discriminator was given in completed steps, over all workers.
        average: exponential moving average of the generator's parameters, by name.
    """

    def __init__(self, model: ModelConfig, optim: OptimConfig, seed: int, device: torch.device | str = "cpu") -> None:
        """A fresh state: Glorot uniform weights from `seed`, u converged on them unless the model says otherwise."""
        self.model, self.optim, self.seed, self.images = model, optim, seed, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = Generator(model)
            self.discriminator = Discriminator(model)
        for network in self._networks.values():
            network.to(device)
        self._start_spectral_norm()
        self._restart_optimizers()
        self.average = ema.copy_of(self.generator)

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
        def adam(network: nn.Module, lr: float) -> torch.optim.Adam:
            betas = (self.optim.beta1, self.optim.beta2)
            return torch.optim.Adam(network.parameters(), lr=lr, betas=betas, eps=self.optim.eps, fused=True)

        self.optimizer_g = adam(self.generator, self.optim.lr_g)
        self.optimizer_d = adam(self.discriminator, self.optim.lr_d)

    def to(self, dtype: torch.dtype) -> TrainState:
        """The same state in another floating-point type; optimisers restart. For exactness tests in float64."""
        for network in self._networks.values():
            network.to(dtype)
        self._restart_optimizers()
        self.average = {name: tensor.to(dtype) for name, tensor in self.average.items()}
        self._start_spectral_norm()
        return self

    def _start_spectral_norm(self) -> None:
        iterations = 1 if self.model.spectral_norm_start == "cold" else spectral_norm.WARM_UP_ITERATIONS
        for network in self._networks.values():
            spectral_norm.warm_up(network, iterations)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the state with a name that is unique in it."""
        for prefix, network in self._networks.items():
            for name, tensor in network.state_dict().items():
                yield f"{prefix}.{name}", tensor
        for name, tensor in self.average.items():
            yield f"average.{name}", tensor
        for prefix, (network, optimizer) in self._optimizers.items():
            for name, parameter in network.named_parameters():
                for moment, tensor in optimizer.state.get(parameter, {}).items():
                    yield f"{prefix}.{name}.{moment}", tensor

    def facts(self) -> dict[str, Any]:
        """What is not a tensor."""
        return {
            "format": FORMAT,
            "images": self.images,
            "seed": self.seed,
            "model": self.model.to_dict(),
            "optim": self.optim.to_dict(),
        }

    def save(self, folder: Path | str) -> None:
        """Write state.safetensors and state.json into an existing folder."""
        folder = Path(folder)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors()}, folder / TENSORS)
        (folder / FACTS).write_text(json.dumps(self.facts(), indent=1, sort_keys=True))

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> TrainState:
        """The state that `save` wrote, on any device.

        Raises ValueError for a format this version does not know, KeyError where a tensor is missing.
        """
        folder = Path(folder)
        facts = json.loads((folder / FACTS).read_text())
        if facts["format"] != FORMAT:
            raise ValueError(f"{folder / FACTS} has format {facts['format']}; this version reads format {FORMAT}")
        tensors = load_file(folder / TENSORS)
        state = cls(ModelConfig.from_dict(facts["model"]), OptimConfig(**facts["optim"]), facts["seed"], device)
        state.images = facts["images"]
        for prefix, network in state._networks.items():
            network.load_state_dict({n: tensors[f"{prefix}.{n}"] for n in network.state_dict()})
            spectral_norm.refresh(network)
        for name, tensor in state.average.items():
            tensor.copy_(tensors[f"average.{name}"])
        for prefix, (network, optimizer) in state._optimizers.items():
            for name, parameter in network.named_parameters():
                key = f"{prefix}.{name}"
                if f"{key}.step" in tensors:
                    optimizer.state[parameter] = {
                        "step": tensors[f"{key}.step"].to(device),
                        "exp_avg": torch.empty_like(parameter).copy_(tensors[f"{key}.exp_avg"]),
                        "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"{key}.exp_avg_sq"]),
                    }
        return state
