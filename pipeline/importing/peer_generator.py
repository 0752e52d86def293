"""A generator in the form that all peers share, and its translation to sagan's generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.importing.foreign_tensors import ForeignTensors
from sagan.config import ModelConfig
from sagan.generator import Generator


@dataclass(frozen=True)
class Layer:
    """Convolution or linear layer. Its weight [out, in, …] is divided by σ. Its bias is [out]."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, tensors: ForeignTensors, name: str, *shape: int | None) -> Layer:
        """Take a layer of a torch module whose weight has a shape. Raises UsageError."""
        weight = tensors.weight(name, *shape)
        return cls(weight, tensors.take(f"{name}.bias", len(weight)))


@dataclass(frozen=True)
class Norm:
    """Batch norm with fixed statistics.

    Attributes:
        scale: Scale [C], or [num_classes, C] where it depends on the label.
        shift: Shift of the same shape.
        mean: Mean [C].
        variance: Variance [C].
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Block:
    """Residual block that doubles height and width. The kernels are [out, in, k, k]."""

    norm1: Norm
    conv1: Layer
    norm2: Norm
    conv2: Layer
    skip: Layer


@dataclass(frozen=True)
class Attention:
    """Self-attention with pooled keys and values. The kernels are [out, in, 1, 1], and gamma is a scalar."""

    theta: Tensor
    phi: Tensor
    g: Tensor
    out: Tensor
    gamma: Tensor


@dataclass(frozen=True)
class PeerGenerator:
    """Generator of a peer, with spectral norm folded into its weights. Its images have the channels R, G, B.

    Attributes:
        linear: First layer. Its output is the feature map [C, 4, 4].
        blocks: Blocks in the order of the forward pass. Attention stands after the block whose output it takes.
        norm: Last batch norm.
        conv: Last convolution.
        spectral_norm: Whether training divided the weights by their spectral norms.
    """

    linear: Layer
    blocks: Sequence[Block | Attention]
    norm: Norm
    conv: Layer
    spectral_norm: bool


def configuration(peer: PeerGenerator, batch_norm_eps: float, slope: float) -> ModelConfig:
    """Return the configuration whose generator is the peer's.

    Args:
        peer: The generator.
        batch_norm_eps: Constant that batch norm adds to variances.
        slope: Negative slope of the rectifiers.

    Raises UsageError that names the value which sagan's generator cannot have.
    """
    residual = [block for block in peer.blocks if isinstance(block, Block)]
    resolution = 4 * 2 ** len(residual)
    widths = [block.norm1.scale.shape[-1] for block in residual] + [peer.conv.weight.shape[1]]
    attention, size = [], 4
    for block in peer.blocks:
        if isinstance(block, Block):
            size *= 2
        else:
            attention.append(size)
    try:
        plain = ModelConfig(resolution=resolution, num_classes=0, channels_g=1, attention=())
        base = widths[-1] // plain.widths_g[-1]
        is_standard = widths == [base * width for width in plain.widths_g]
        base = base if is_standard else math.gcd(*widths)
        table = residual[0].norm1.scale
        return ModelConfig(
            resolution=resolution,
            num_classes=len(table) if table.dim() == 2 else 0,
            z_dim=peer.linear.weight.shape[1],
            channels_g=base,
            multipliers_g=None if is_standard else tuple(width // base for width in widths),
            attention=tuple(attention),
            slope_g=slope,
            spectral_norm_g=peer.spectral_norm,
            batch_norm_eps=batch_norm_eps,
        )
    except ValueError as error:
        raise UsageError(f"sagan's generator cannot have the structure of this file: {error}") from error


def state_dict(peer: PeerGenerator, config: ModelConfig) -> dict[str, Tensor]:
    """Return the state dict of `Generator(config, folded=True)`, in the dtype of the peer's tensors.

    Raises UsageError that names a tensor whose shape differs from that of sagan's generator.
    """
    state = {"linear.weight": peer.linear.weight, "linear.bias": peer.linear.bias}
    for number, block in enumerate(peer.blocks):
        tensors = _block(block) if isinstance(block, Block) else _attention(block)
        state |= {f"blocks.{number}.{name}": tensor for name, tensor in tensors.items()}
    state |= {f"norm.{name}": tensor for name, tensor in _norm(peer.norm).items()}
    state |= {"conv.weight": _kernel(peer.conv.weight), "conv.bias": peer.conv.bias}
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Generator(config, folded=True).state_dict().items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            shapes = [list(shape) if shape is not None else None for shape in (found.get(name), expected.get(name))]
            raise UsageError(
                f"sagan's generator cannot have the structure of this file: {name} would have the shape {shapes[0]} "
                f"instead of {shapes[1]}"
            )
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _block(block: Block) -> dict[str, Tensor]:
    state = {f"norm1.{name}": tensor for name, tensor in _norm(block.norm1).items()}
    # [in, height, width, out], flipped (sagan.spectral_norm.TransposedConv2d)
    state |= {"conv1.weight": block.conv1.weight.flip(2, 3).permute(1, 2, 3, 0), "conv1.bias": block.conv1.bias}
    state |= {f"norm2.{name}": tensor for name, tensor in _norm(block.norm2).items()}
    state |= {"conv2.weight": _kernel(block.conv2.weight), "conv2.bias": block.conv2.bias}
    return state | {"skip.weight": _kernel(block.skip.weight), "skip.bias": block.skip.bias}


def _attention(attention: Attention) -> dict[str, Tensor]:
    kernels = {"theta": attention.theta, "phi": attention.phi, "g": attention.g, "out": attention.out}
    return {f"{name}.weight": _kernel(kernel) for name, kernel in kernels.items()} | {"gamma": attention.gamma}


def _norm(norm: Norm) -> dict[str, Tensor]:
    names = ("weight", "bias", "running_mean", "running_var")
    return dict(zip(names, (norm.scale, norm.shift, norm.mean, norm.variance), strict=True))


def _kernel(weight: Tensor) -> Tensor:
    """Return a kernel [out, in, height, width] as [out, height, width, in]."""
    return weight.permute(0, 2, 3, 1)
