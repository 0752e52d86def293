"""Reads generators of ajbrock/BigGAN-PyTorch without hierarchical latents, such as those of its SAGAN script."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipeline.importing.choices import Choices
from pipeline.importing.foreign_tensors import ForeignTensors
from pipeline.importing.peer_generator import Attention, Block, Layer, Norm, PeerGenerator

_LAST_EPS = 1e-5  # the code passes --BN_eps to all batch norms but the last


def told(tensors: ForeignTensors) -> dict[str, Any]:
    """Return the choices that the code fixes."""
    return {"scale_offset": 1.0, "channel_order": "rgb", "slope": 0.0}


def read(tensors: ForeignTensors, choices: Choices) -> PeerGenerator:
    """Read G.pth or G_ema.pth. Raises UsageError where the file holds another network."""
    shared = tensors.take("shared.weight", None, None) if "shared.weight" in tensors else None
    linear = Layer.of(tensors, "linear", None, None)
    channels, blocks, stage = len(linear.bias) // 16, list[Block | Attention](), 0
    while tensors.names_below(f"blocks.{stage}."):
        name, stage = f"blocks.{stage}", stage + 1
        conv1 = Layer.of(tensors, f"{name}.0.conv1", None, channels, 3, 3)
        norm1 = _class_norm(tensors, f"{name}.0.bn1", channels, shared, choices)
        skip = Layer.of(tensors, f"{name}.0.conv_sc", len(conv1.bias), channels, 1, 1)
        channels = len(conv1.bias)
        norm2 = _class_norm(tensors, f"{name}.0.bn2", channels, shared, choices)
        conv2 = Layer.of(tensors, f"{name}.0.conv2", channels, channels, 3, 3)
        blocks.append(Block(norm1, conv1, norm2, conv2, skip))
        if tensors.names_below(f"{name}.1."):
            blocks.append(_attention(tensors, f"{name}.1", channels))
    mean, variance = _statistics(tensors, "output_layer.0", channels)
    # sagan's generator has one ε. The scale makes up for the other.
    scale = tensors.take("output_layer.0.gain", channels)
    scale = scale * ((variance + choices.batch_norm_eps) / (variance + _LAST_EPS)).sqrt()
    norm = Norm(scale, tensors.take("output_layer.0.bias", channels), mean, variance)
    conv = Layer.of(tensors, "output_layer.2", 3, channels, 3, 3)
    # --num_G_SVs above 1 tracks further singular values, which divide nothing. sv0, sv1, … are for logs.
    tensors.leave(r".*\.(sv\d+|u[1-9]\d*|num_batches_tracked)")
    tensors.require_all_taken()
    return PeerGenerator(linear, blocks, norm, conv, tensors.is_normalised("linear"))


def _class_norm(tensors: ForeignTensors, name: str, channels: int, shared: Tensor | None, choices: Choices) -> Norm:
    mean, variance = _statistics(tensors, name, channels)
    scale, shift = (_table(tensors, f"{name}.{which}", channels, shared) for which in ("gain", "bias"))
    return Norm(scale + choices.scale_offset, shift, mean, variance)


def _table(tensors: ForeignTensors, name: str, channels: int, shared: Tensor | None) -> Tensor:
    """Return a table [num_classes, C]. With a shared embedding (--G_shared), it is a linear map of the embedding."""
    if shared is None:
        return tensors.weight(name, None, channels)
    matrix = tensors.weight(name, channels, None)
    if matrix.shape[1] != shared.shape[1]:
        raise tensors.refusal(
            f"{name} takes {matrix.shape[1]} inputs, and {shared.shape[1]} of them are the shared embedding of the "
            "label. The others are parts of the latent vector (--hier), which sagan's generator takes at its first "
            "layer alone"
        )
    return shared @ matrix.t()


def _statistics(tensors: ForeignTensors, name: str, channels: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a batch norm, in one of the code's three forms.

    They are in the layer itself; with --mybn or --cross_replica, they are in a layer inside.
    """
    if f"{name}.bn.running_mean" in tensors:
        return tensors.statistics(f"{name}.bn.running_mean", f"{name}.bn.running_var", channels)
    if f"{name}.bn.stored_mean" not in tensors:
        return tensors.statistics(f"{name}.stored_mean", f"{name}.stored_var", channels)
    mean, variance = tensors.statistics(f"{name}.bn.stored_mean", f"{name}.bn.stored_var", channels)
    count = tensors.take(f"{name}.bn.accumulation_counter", 1)
    # Above 0, standing statistics were taken. The others are then sums over this many batches.
    return (mean / count, variance / count) if count > 0 else (mean, variance)


def _attention(tensors: ForeignTensors, name: str, channels: int) -> Attention:
    return Attention(
        theta=tensors.weight(f"{name}.theta", channels // 8, channels, 1, 1),
        phi=tensors.weight(f"{name}.phi", channels // 8, channels, 1, 1),
        g=tensors.weight(f"{name}.g", channels // 2, channels, 1, 1),
        out=tensors.weight(f"{name}.o", channels, channels // 2, 1, 1),
        gamma=tensors.take(f"{name}.gamma"),
    )
