"""Finished generator: weights divided by their σ, batch-norm statistics for sampling, and class names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sagan import spectral_norm
from sagan.config import ModelConfig
from sagan.generator import Generator
from sagan.random import Purpose, draw_latents
from sagan.standing_statistics import take_standing_statistics
from sagan.train_state import TrainState

FORMAT = 4
TENSORS, FACTS = "generator.safetensors", "config.json"


class Model:
    """Finished generator for evaluation, export and sampling. Training does not change it.

    Attributes:
        config: configuration of the networks.
        generator: network with folded weights, in evaluation mode.
        class_names: names of the classes by label; empty where the classes have no names.
        weights: "ema" for the moving average of the weights, "raw" for the weights themselves.
        batch_norm: "standing N" for statistics over N generated images, "running" for the running averages of training.
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
        """Return the finished generator of a training state.

        σ is converged on the weights that the model uses.

        Args:
            state: the training state. It is not changed.
            weights: "ema" for the moving average, "raw" for the weights themselves.
            standing_images: number of latents for the standing statistics of batch norm. With None, batch norm keeps
                the state's running averages (the official code's choice). They were taken from the raw weights while
                these changed.
            seed: seed of the latents and labels for the standing statistics.
            class_names: names of the classes by label.
        """
        device = next(state.generator.parameters()).device
        unfolded = Generator(state.model).to(device)
        unfolded.load_state_dict(state.generator.state_dict())
        if weights == "ema":
            unfolded.load_state_dict({**state.generator.state_dict(), **state.ema})
        spectral_norm.warm_up(unfolded)
        if standing_images is not None:
            take_standing_statistics(unfolded, state.model, standing_images, seed)
        folded = Generator(state.model, folded=True).to(device)
        folded.load_state_dict(spectral_norm.fold(unfolded))
        return cls(state.model, folded, class_names, weights=weights, batch_norm=statistics_name(standing_images))

    @property
    def device(self) -> torch.device:
        """Device of the generator."""
        return next(self.generator.parameters()).device

    def to(self, device: torch.device | str) -> Model:
        """Move the generator to `device`, and return the model."""
        self.generator.to(device)
        return self

    @torch.inference_mode()
    def generate(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Return the images of the given latents and labels, uint8 [n, 3, H, W] on the model's device.

        Args:
            z: latents, float32 [n, z_dim].
            y: labels, int64 [n]. An unconditional model ignores them.
        """
        y = y.to(self.device) if y is not None and self.config.known_num_classes else None
        images = self.generator(z.to(self.device), y)
        return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)

    def sample(
        self,
        classes: Sequence[int | str] | None = None,
        n: int = 16,
        seed: int = 0,
        truncation: float = 1.0,
    ) -> Tensor:
        """Return n images, uint8 [n, 3, H, W].

        Args:
            classes: indices or names of classes, repeated in turn up to n. The default is all classes in turn.
            n: number of images.
            seed: seed of the latents.
            truncation: factor of the latents. Below 1, images are more typical and less varied.

        Raises ValueError where the model does not have a class, or where an unconditional model is given classes.
        """
        z = truncation * draw_latents(seed, Purpose.SAMPLE_Z, range(n), self.config.z_dim)
        y = self.labels_for(classes, n)
        chunks = [self.generate(z[i : i + 64], None if y is None else y[i : i + 64]) for i in range(0, n, 64)]
        return torch.cat(chunks)

    def labels_for(self, classes: Sequence[int | str] | None, n: int) -> Tensor | None:
        """Return the labels of n images of the given classes, int64 [n], or None for an unconditional model.

        `classes` and the errors raised are those of `sample`.
        """
        if not self.config.known_num_classes:
            if classes:
                raise ValueError("this model was trained without classes; leave `classes` out")
            return None
        indices = [self._class_index(c) for c in classes] if classes else range(self.config.known_num_classes)
        return torch.tensor([indices[i % len(indices)] for i in range(n)])

    def _class_index(self, name_or_index: int | str) -> int:
        """Return the index of a class. A name takes precedence over an index."""
        if isinstance(name_or_index, str) and name_or_index in self.class_names:
            return self.class_names.index(name_or_index)
        num_classes = self.config.known_num_classes
        if str(name_or_index).isdigit() and int(name_or_index) < num_classes:
            return int(name_or_index)
        names = ", ".join(self.class_names[:10]) + (", …" if len(self.class_names) > 10 else "")
        known = names or f"0 to {num_classes - 1}"
        raise ValueError(f"the model has no class {name_or_index!r}; it has {num_classes} classes: {known}")

    def save(self, folder: Path | str) -> None:
        """Write generator.safetensors, config.json and code/sagan/, a copy of this package.

        Loading the model needs nothing else. `folder` is created where it does not exist.
        """
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
        """Return the model that `save` wrote to `folder`.

        Somebody else may have written the folder. Memory is allocated only after the tensors have the shapes that the
        configuration describes. Raises FileNotFoundError where the folder holds no model, and ValueError where the
        format is unknown or a file is damaged.
        """
        folder = Path(folder)
        if not (folder / FACTS).exists() or not (folder / TENSORS).exists():
            raise FileNotFoundError(f"{folder} holds no model: it must contain {TENSORS} and {FACTS}")
        try:
            facts = json.loads((folder / FACTS).read_text())
            if facts["format"] != FORMAT:
                raise ValueError(f"it has format {facts['format']}; this version reads format {FORMAT}")
            config, class_names = ModelConfig.from_dict(facts["model"]), facts["class_names"]
            weights, batch_norm = facts["weights"], facts["batch_norm"]
            check_class_names(class_names, config.known_num_classes)
            with torch.device("meta"):
                shapes = {name: tensor.shape for name, tensor in Generator(config, folded=True).state_dict().items()}
        except KeyError as error:
            raise ValueError(f"{folder / FACTS} has no entry {error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{folder / FACTS}: {error}") from error
        try:
            tensors = load_file(folder / TENSORS)
        except SafetensorError as error:
            raise ValueError(f"{folder / TENSORS} is damaged: {error}") from error
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise ValueError(f"{folder / TENSORS} does not hold the generator that {FACTS} describes")
        generator = Generator(config, folded=True)
        generator.load_state_dict(tensors)
        generator.to(device)
        return cls(config, generator, class_names, weights=weights, batch_norm=batch_norm)


def check_class_names(class_names: object, num_classes: int) -> None:
    """Raise ValueError unless `class_names` is a list of `num_classes` different texts, or empty."""
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        raise ValueError("class_names must be a list of texts")
    if len(set(class_names)) < len(class_names):
        raise ValueError("class_names must not have a name twice")
    if class_names and len(class_names) != num_classes:
        raise ValueError(f"class_names has {len(class_names)} names for {num_classes} classes")


def statistics_name(standing_images: int | None) -> str:
    """Return the value of `Model.batch_norm`.

    `standing_images` is the number of images of the standing statistics, or None for running averages.
    """
    return "running" if standing_images is None else f"standing {standing_images}"
