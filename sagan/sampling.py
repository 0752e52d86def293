"""A finished generator: weights divided by their σ, standing batch-norm statistics, class names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sagan import batch_norm, spectral_norm
from sagan.batch_norm import Groups
from sagan.config import ModelConfig
from sagan.generator import Generator
from sagan.random import Purpose, labels, latents
from sagan.state import TrainState
from sagan.world import World

FORMAT = 3
TENSORS, FACTS = "generator.safetensors", "config.json"
STANDING_GROUP = 128  # images that are normalised together while standing statistics are taken


class Model:
    """What is evaluated, exported and sampled from. Nothing in it changes.

    Attributes:
        weights: "ema" (the average) or "raw".
        batch_norm: "standing N" for statistics over N images, or "running" for averages from training.
    """

    def __init__(
        self,
        config: ModelConfig,
        generator: Generator,
        class_names: Sequence[str] = (),
        *,
        weights: str,
        batch_norm: str,
    ) -> None:
        self.config, self.class_names = config, list(class_names)
        self.weights, self.batch_norm = weights, batch_norm
        self.generator = generator.eval().requires_grad_(False)

    @classmethod
    def from_state(
        cls,
        state: TrainState,
        *,
        weights: str = "ema",
        standing_images: int | None = 4096,
        seed: int = 0,
        class_names: Sequence[str] = (),
    ) -> Model:
        """The generator of a training state, with the `weights` "ema" (the average) or "raw".

        σ is converged on the very weights that are used, and batch norm gets their standing statistics over
        `standing_images` latents from `seed`. With None it keeps the state's running averages, which the raw weights
        left behind while they moved (the official code's choice).
        """
        device = next(state.generator.parameters()).device
        live = Generator(state.model).to(device)
        live.load_state_dict(state.generator.state_dict())
        if weights == "ema":
            live.load_state_dict({**state.generator.state_dict(), **state.average})
        spectral_norm.warm_up(live)
        if standing_images is not None:
            take_standing_statistics(live, state.model, standing_images, seed)
        generator = Generator(state.model, folded=True).to(device)
        generator.load_state_dict(spectral_norm.fold(live))
        return cls(state.model, generator, class_names, weights=weights, batch_norm=statistics_name(standing_images))

    @property
    def device(self) -> torch.device:
        return next(self.generator.parameters()).device

    def to(self, device: torch.device | str) -> Model:
        self.generator.to(device)
        return self

    @torch.inference_mode()
    def generate(self, z: Tensor, y: Tensor | None) -> Tensor:
        """z float32 [n, z_dim], y int64 [n] (ignored when unconditional) → uint8 [n, 3, H, W] on the model's device."""
        y = y.to(self.device) if y is not None and self.config.labels else None
        images = self.generator(z.to(self.device), y)
        return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)

    def sample(
        self,
        classes: Sequence[int | str] | None = None,
        n: int = 16,
        seed: int = 0,
        truncation: float = 1.0,
    ) -> Tensor:
        """uint8 [n, 3, H, W]. `classes` (indices or names) are repeated in turn up to n; default all classes in turn.

        `truncation` scales the latents: below 1 images are more typical and less varied.

        Raises ValueError for a class that the model does not have, or for classes asked of an unconditional model.
        """
        z = truncation * latents(seed, Purpose.SAMPLE_Z, range(n), self.config.z_dim)
        y = self.labels(classes, n)
        parts = [self.generate(z[i : i + 64], None if y is None else y[i : i + 64]) for i in range(0, n, 64)]
        return torch.cat(parts)

    def labels(self, classes: Sequence[int | str] | None, n: int) -> Tensor | None:
        """int64 [n] of `sample`'s classes; None when unconditional. Raises ValueError as `sample` does."""
        if not self.config.labels:
            if classes:
                raise ValueError("this model was trained without classes; leave `classes` out")
            return None
        indices = [self._class_index(c) for c in classes] if classes else range(self.config.labels)
        return torch.tensor([indices[i % len(indices)] for i in range(n)])

    def _class_index(self, wanted: int | str) -> int:
        if isinstance(wanted, str) and wanted in self.class_names:
            return self.class_names.index(wanted)
        if str(wanted).isdigit() and int(wanted) < self.config.labels:
            return int(wanted)
        names = ", ".join(self.class_names[:10]) + (", …" if len(self.class_names) > 10 else "")
        raise ValueError(f"no class {wanted!r}; there are {self.config.labels}: {names or 'by number only'}")

    def save(self, folder: Path | str) -> None:
        """Write generator.safetensors, config.json and code/sagan/ (this package), which is all that loading needs."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.cpu().contiguous() for n, t in self.generator.state_dict().items()}, folder / TENSORS)
        facts = {
            "format": FORMAT,
            "model": self.config.to_dict(),
            "class_names": self.class_names,
            "weights": self.weights,
            "batch_norm": self.batch_norm,
        }
        (folder / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False))
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(__file__).parent, folder / "code" / "sagan", ignore=ignore, dirs_exist_ok=True)

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> Model:
        """The model that `save` wrote.

        Raises FileNotFoundError where the folder holds no model, ValueError for an unknown format.
        """
        folder = Path(folder)
        if not (folder / FACTS).exists() or not (folder / TENSORS).exists():
            raise FileNotFoundError(f"{folder} holds no model: {TENSORS} and {FACTS} are what makes one")
        facts = json.loads((folder / FACTS).read_text())
        if facts["format"] != FORMAT:
            raise ValueError(f"{folder / FACTS} has format {facts['format']}; this version reads format {FORMAT}")
        config = ModelConfig.from_dict(facts["model"])
        generator = Generator(config, folded=True)
        generator.load_state_dict(load_file(folder / TENSORS))
        generator.to(device)
        made = {name: facts[name] for name in ("weights", "batch_norm")}
        return cls(config, generator, facts["class_names"], **made)


def statistics_name(standing_images: int | None) -> str:
    """What `Model.batch_norm` says of statistics over so many images; None for running averages."""
    return "running" if standing_images is None else f"standing {standing_images}"


@torch.no_grad()
def take_standing_statistics(generator: Generator, model: ModelConfig, images: int, seed: int) -> None:
    """Set the running statistics to those of `images` fixed latents, in groups of 128 combined in float64.

    The result depends on the weights, `images` and `seed` alone, not on how evaluation is batched or spread.
    """
    norms = batch_norm.layers(generator)
    weight = next(generator.parameters())
    total, mean, square = 0, None, None
    for start in range(0, images, STANDING_GROUP):
        positions = range(start, min(start + STANDING_GROUP, images))
        z = latents(seed, Purpose.STANDING_Z, positions, model.z_dim).to(weight)
        y = labels(seed, Purpose.STANDING_Y, positions, model.labels).to(weight.device) if model.labels else None
        generator(z, y, Groups(positions, 1, World(), weight.device))
        means = torch.cat([norm.batch_mean for norm in norms]).double() * len(positions)
        variances = torch.cat([norm.batch_var for norm in norms]).double() * len(positions)
        squares = variances + means.square() / len(positions)
        total += len(positions)
        mean = means if mean is None else mean + means
        square = squares if square is None else square + squares
    assert mean is not None
    assert square is not None
    mean = mean / total
    variance = square / total - mean.square()
    sizes = [len(norm.running_mean) for norm in norms]
    for norm, m, v in zip(norms, mean.split(sizes), variance.split(sizes), strict=True):
        norm.running_mean.copy_(m)
        norm.running_var.copy_(v.clamp(min=0))
