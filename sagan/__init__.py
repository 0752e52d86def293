"""The Self-Attention GAN (Zhang et al. 2019) in pure PyTorch.

model = sagan.load("champion")                        # a folder that `sagan pull` or `Model.save` wrote
images = model.sample(classes=["7"], n=16, seed=0)    # uint8 [16, 3, H, W]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sagan.config import ModelConfig, OptimConfig

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from sagan.ranks import World
    from sagan.step import Step
    from sagan.train_state import TrainState
    from sagan.trained_model import Model

__all__ = ["Model", "ModelConfig", "OptimConfig", "Step", "TrainState", "World", "load"]

# Commands that read a configuration alone import no PyTorch, which takes seconds.
_MODULES = {
    "Model": "sagan.trained_model",
    "Step": "sagan.step",
    "TrainState": "sagan.train_state",
    "World": "sagan.ranks",
}


def load(folder: Path | str, device: torch.device | str = "cpu") -> Model:
    """Return the model of a folder that `sagan pull` or `Model.save` wrote. See `Model.load`."""
    from sagan.trained_model import Model

    return Model.load(folder, device)


def __getattr__(name: str) -> Any:
    """Import a class from its module when it is used first."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
