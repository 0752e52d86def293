"""Reads generators of POSTECH-CVLab/PyTorch-StudioGAN whose backbone is `resnet`, such as its SAGAN and SNGAN."""

from __future__ import annotations

from typing import Any

from pipeline.importing.choices import Choices
from pipeline.importing.foreign_tensors import ForeignTensors
from pipeline.importing.peer_generator import Attention, Block, Layer, Norm, PeerGenerator


def told(tensors: ForeignTensors) -> dict[str, Any]:
    """Return the choices that the code fixes."""
    return {"batch_norm_eps": 1e-4, "scale_offset": 1.0, "channel_order": "rgb"}


def read(tensors: ForeignTensors, choices: Choices) -> PeerGenerator:
    """Read `model=G-….pth` or `model=G_ema-….pth`. Raises UsageError where the file holds another network."""
    linear = Layer.of(tensors, "linear0", None, None)
    channels, blocks = len(linear.bias) // 16, list[Block | Attention]()
    while tensors.names_below(name := f"blocks.{len(blocks)}.0."):
        if tensors.names_below(f"{name}conv1x1_theta."):
            blocks.append(_attention(tensors, name, channels))
            continue
        conv1 = Layer.of(tensors, f"{name}conv2d1", None, channels, 3, 3)
        norm1 = _class_norm(tensors, f"{name}bn1", channels, choices)
        skip = Layer.of(tensors, f"{name}conv2d0", len(conv1.bias), channels, 1, 1)
        channels = len(conv1.bias)
        norm2 = _class_norm(tensors, f"{name}bn2", channels, choices)
        conv2 = Layer.of(tensors, f"{name}conv2d2", channels, channels, 3, 3)
        blocks.append(Block(norm1, conv1, norm2, conv2, skip))
    norm = _norm(tensors, "bn4", channels)
    conv = Layer.of(tensors, "conv2d5", 3, channels, 3, 3)
    tensors.leave(r".*\.num_batches_tracked")
    tensors.require_all_taken()
    return PeerGenerator(linear, blocks, norm, conv, tensors.is_normalised("linear0"))


def _norm(tensors: ForeignTensors, name: str, channels: int) -> Norm:
    mean, variance = tensors.statistics(f"{name}.running_mean", f"{name}.running_var", channels)
    return Norm(tensors.take(f"{name}.weight", channels), tensors.take(f"{name}.bias", channels), mean, variance)


def _class_norm(tensors: ForeignTensors, name: str, channels: int, choices: Choices) -> Norm:
    """Return a batch norm, whose class tables are linear layers of the one-hot label where there are classes."""
    if f"{name}.running_mean" in tensors:
        return _norm(tensors, name, channels)
    mean, variance = tensors.statistics(f"{name}.bn.running_mean", f"{name}.bn.running_var", channels)
    scale, shift = (tensors.weight(f"{name}.{which}", channels, None).t() for which in ("gain", "bias"))
    return Norm(scale + choices.scale_offset, shift, mean, variance)


def _attention(tensors: ForeignTensors, name: str, channels: int) -> Attention:
    return Attention(
        theta=tensors.weight(f"{name}conv1x1_theta", channels // 8, channels, 1, 1),
        phi=tensors.weight(f"{name}conv1x1_phi", channels // 8, channels, 1, 1),
        g=tensors.weight(f"{name}conv1x1_g", channels // 2, channels, 1, 1),
        out=tensors.weight(f"{name}conv1x1_attn", channels, channels // 2, 1, 1),
        gamma=tensors.take(f"{name}sigma", 1)[0],
    )
