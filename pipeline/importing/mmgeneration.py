"""Reads SAGAN's and SNGAN's generators of open-mmlab/mmgeneration (SNGANGenerator with SNGANGenResBlock)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipeline.importing.choices import Choices
from pipeline.importing.foreign_tensors import ForeignTensors
from pipeline.importing.peer_generator import Attention, Block, Layer, Norm, PeerGenerator

_PREFIXES = {"raw": "generator.", "ema": "generator_ema."}


def told(tensors: ForeignTensors) -> dict[str, Any]:
    """Return the choices that the names tell: the kind of weights, and that nothing depends on labels."""
    kinds = [kind for kind, prefix in _PREFIXES.items() if tensors.names_below(prefix)]
    choices: dict[str, Any] = {"weights": kinds[0]} if len(kinds) == 1 else {}
    own = tensors.below(_PREFIXES[kinds[0]] if kinds else "")
    if "conv_blocks.0.norm_1.norm.running_mean" in own and not own.names_below("conv_blocks.0.norm_1.weight_embedding"):
        choices["scale_offset"] = 0.0
    return choices


def read(tensors: ForeignTensors, choices: Choices) -> PeerGenerator:
    """Read a checkpoint of a run, or a state dict of the generator. Raises UsageError where it is another network."""
    if any(tensors.names_below(prefix) for prefix in _PREFIXES.values()):
        tensors = tensors.below(_PREFIXES[choices.weights])
    linear = Layer.of(tensors, "noise2feat", None, None)
    channels, blocks, number = len(linear.bias) // 16, list[Block | Attention](), 0
    while tensors.names_below(name := f"conv_blocks.{number}."):
        if tensors.names_below(f"{name}theta."):
            blocks.append(_attention(tensors, name, channels))
        else:
            conv1 = Layer.of(tensors, f"{name}conv_1.conv", None, channels, 3, 3)
            norm1 = _class_norm(tensors, f"{name}norm_1", channels, choices)
            skip = Layer.of(tensors, f"{name}shortcut.conv", len(conv1.bias), channels, 1, 1)
            channels = len(conv1.bias)
            norm2 = _class_norm(tensors, f"{name}norm_2", channels, choices)
            conv2 = Layer.of(tensors, f"{name}conv_2.conv", channels, channels, 3, 3)
            blocks.append(Block(norm1, conv1, norm2, conv2, skip))
        number += 1
    mean, variance = tensors.statistics("to_rgb.bn.running_mean", "to_rgb.bn.running_var", channels)
    scale, shift = (tensors.take(f"to_rgb.bn.{which}", channels) for which in ("weight", "bias"))
    conv = Layer.of(tensors, "to_rgb.conv", 3, channels, 3, 3)
    if choices.channel_order == "bgr":
        conv = Layer(conv.weight.flip(0), conv.bias.flip(0))
    tensors.leave(r".*\.(num_batches_tracked|sv0)")
    tensors.require_all_taken()
    norm = Norm(scale, shift, mean, variance)
    return PeerGenerator(linear, blocks, norm, conv, tensors.is_normalised("noise2feat"))


def _class_norm(tensors: ForeignTensors, name: str, channels: int, choices: Choices) -> Norm:
    """Return a batch norm. It has class tables, a scale and a shift of its own, or both, one after the other."""
    mean, variance = tensors.statistics(f"{name}.norm.running_mean", f"{name}.norm.running_var", channels)
    own: tuple[Tensor, Tensor] | None = None
    if f"{name}.norm.weight" in tensors:
        own = tensors.take(f"{name}.norm.weight", channels), tensors.take(f"{name}.norm.bias", channels)
    if own is not None and not tensors.names_below(f"{name}.weight_embedding."):
        return Norm(*own, mean, variance)
    scale = tensors.weight(f"{name}.weight_embedding", None, channels) + choices.scale_offset
    shift = tensors.weight(f"{name}.bias_embedding", len(scale), channels)
    if own is not None:
        scale, shift = scale * own[0], scale * own[1] + shift
    return Norm(scale, shift, mean, variance)


def _attention(tensors: ForeignTensors, name: str, channels: int) -> Attention:
    return Attention(
        theta=tensors.weight(f"{name}theta.conv", channels // 8, channels, 1, 1),
        phi=tensors.weight(f"{name}phi.conv", channels // 8, channels, 1, 1),
        g=tensors.weight(f"{name}g.conv", channels // 2, channels, 1, 1),
        out=tensors.weight(f"{name}o.conv", channels, channels // 2, 1, 1),
        gamma=tensors.take(f"{name}gamma"),
    )
