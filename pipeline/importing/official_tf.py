"""Reads generators of brain-research/self-attention-gan, whose variables are in a .safetensors file."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipeline.errors import UsageError, shown_url
from pipeline.importing.choices import Choices
from pipeline.importing.foreign_tensors import ForeignTensors, iterated_sigma
from pipeline.importing.peer_generator import Attention, Block, Layer, Norm, PeerGenerator

_CONVERT = (
    'convert it where TensorFlow is installed: python -c "import numpy, tensorflow, safetensors.numpy; '
    "r = tensorflow.train.load_checkpoint('PREFIX'); safetensors.numpy.save_file({n: numpy.array(r.get_tensor(n)) "
    "for n in r.get_variable_to_shape_map() if n.startswith('model/g_')}, 'FILE.safetensors')\", and import "
    "FILE.safetensors"
)
_LAYERS = {"theta": "sn_conv_theta", "phi": "sn_conv_phi", "g": "sn_conv_g", "out": "sn_conv_attn"}


def require_safetensors(source: str) -> None:
    """Raise UsageError, which says how to convert a checkpoint, where a file is no .safetensors file."""
    if not shown_url(source).endswith(".safetensors"):
        raise UsageError(f"{source} is no .safetensors file. TensorFlow's checkpoints cannot be read", _CONVERT)


def told(tensors: ForeignTensors) -> dict[str, Any]:
    """Return the choices that the code fixes. Its scales are the values of `gamma`."""
    return {"weights": "raw", "batch_norm_eps": 1e-5, "scale_offset": 0.0, "channel_order": "rgb", "slope": 0.0}


def read(tensors: ForeignTensors, choices: Choices) -> PeerGenerator:
    """Read the generator of `generator_type` test or baseline. Raises UsageError where the file holds another."""
    tensors = tensors.below("model/g_")
    matrix = _weight(tensors, "snh0/Matrix", None, None)
    bias = tensors.take("snh0/bias", len(matrix))
    # The output is [4, 4, C] here, and [C, 4, 4] in sagan.
    if len(matrix) % 16:
        raise tensors.refusal(f"model/g_snh0 has {len(matrix)} outputs, which are no feature map of 4×4")
    channels = len(matrix) // 16
    # No two blocks have outputs of the same width, so the width of the attention tells its place.
    name = f"non_local/{_LAYERS['theta']}/w"
    attended = tensors.take(name, 1, 1, None, None).shape[2] if name in tensors else None
    linear = Layer(
        matrix.view(4, 4, channels, -1).permute(2, 0, 1, 3).reshape(matrix.shape),
        bias.view(4, 4, channels).permute(2, 0, 1).flatten(),
    )
    blocks, number = list[Block | Attention](), 1
    while tensors.names_below(name := f"block{number}/"):
        conv1 = _conv(tensors, f"{name}snconv1", 3, channels, None)
        norm1 = _class_norm(tensors, f"{name}cbn_0", channels)
        skip = _conv(tensors, f"{name}snconv3", 1, channels, len(conv1.bias))
        channels = len(conv1.bias)
        norm2 = _class_norm(tensors, f"{name}cbn_1", channels)
        conv2 = _conv(tensors, f"{name}snconv2", 3, channels, channels)
        blocks.append(Block(norm1, conv1, norm2, conv2, skip))
        if attended == channels:
            blocks.append(_attention(tensors, channels))
        number += 1
    mean, variance = tensors.statistics("bn/moving_mean", "bn/moving_variance", channels)
    norm = Norm(tensors.take("bn/gamma", channels), tensors.take("bn/beta", channels), mean, variance)
    conv = _conv(tensors, "snconv_last", 3, channels, 3)
    tensors.leave(r".*/Adam(_1)?")
    tensors.require_all_taken()
    return PeerGenerator(linear, blocks, norm, conv, spectral_norm=True)


def _weight(tensors: ForeignTensors, name: str, *shape: int | None) -> Tensor:
    """Return a weight divided by σ, as the matrix [out, everything else].

    The variable has the shape […, out]. Each forward pass runs one power iteration from u, also when it samples.
    """
    weight = tensors.take(name, *shape)
    matrix = weight.flatten(0, -2).t()
    layer = name.rpartition("/")[0]
    return tensors.divided(matrix, iterated_sigma(matrix, tensors.take(f"{layer}/u", 1, len(matrix))[0]), layer)


def _kernel(tensors: ForeignTensors, name: str, side: int, in_: int, out: int | None) -> Tensor:
    """Return a kernel [out, in, side, side], divided by σ."""
    return _weight(tensors, f"{name}/w", side, side, in_, out).unflatten(1, (side, side, in_)).permute(0, 3, 1, 2)


def _conv(tensors: ForeignTensors, name: str, side: int, in_: int, out: int | None) -> Layer:
    kernel = _kernel(tensors, name, side, in_, out)
    return Layer(kernel, tensors.take(f"{name}/biases", len(kernel)))


def _class_norm(tensors: ForeignTensors, name: str, channels: int) -> Norm:
    mean, variance = tensors.statistics(f"{name}/mean", f"{name}/var", 1, 1, 1, channels)
    scale = tensors.take(f"{name}/gamma", None, channels)
    return Norm(scale, tensors.take(f"{name}/beta", len(scale), channels), mean.flatten(), variance.flatten())


def _attention(tensors: ForeignTensors, channels: int) -> Attention:
    widths = {"theta": (channels, channels // 8), "phi": (channels, channels // 8)}
    widths |= {"g": (channels, channels // 2), "out": (channels // 2, channels)}
    kernels = {which: _kernel(tensors, f"non_local/{_LAYERS[which]}", 1, *pair) for which, pair in widths.items()}
    return Attention(**kernels, gamma=tensors.take("non_local/sigma_ratio"))
