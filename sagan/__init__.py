"""The Self-Attention GAN (Zhang et al. 2019) in pure PyTorch.

model = sagan.load("champion")                        # a folder that `sagan pull` or `Model.save` wrote
images = model.sample(classes=["7"], n=16, seed=0)    # uint8 [16, 3, H, W]
"""

from sagan.config import ModelConfig, OptimConfig
from sagan.ranks import World
from sagan.step import Step
from sagan.train_state import TrainState
from sagan.trained_model import Model

load = Model.load

__all__ = ["Model", "ModelConfig", "OptimConfig", "Step", "TrainState", "World", "load"]
