"""State dicts with the names and shapes of other projects, made from a generator of sagan.

A layer with spectral norm gets a weight of three times norm one, so the generator's own weight is scaled to norm one.
Functions that build a state dict therefore change the generator that they are given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sagan.attention import SelfAttention
from sagan.batch_norm import BatchNorm
from sagan.blocks import GeneratorBlock
from sagan.config import ModelConfig
from sagan.generator import Generator
from sagan.spectral_norm import SpectralNorm, TransposedConv2d

State = dict[str, Tensor]
Weight = Callable[[str, Tensor], State]


def random_generator(config: ModelConfig) -> Generator:
    """A folded generator in evaluation mode, all of whose tensors are random."""
    generator = Generator(config, folded=True).eval().requires_grad_(False)
    for name, tensor in generator.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif "norm" in name and name.endswith("weight"):
            tensor.normal_(1, 0.3)
        elif name.endswith("gamma"):
            tensor.fill_(0.7)
        elif tensor.dim() < 3 or "norm" in name:
            tensor.normal_(0, 0.3)
    return generator


def plain(name: str, weight: Tensor) -> State:
    """A layer without spectral norm."""
    return {f"{name}.weight": weight.clone()}


def torch_norm(name: str, weight: Tensor) -> State:
    """A layer with torch.nn.utils.spectral_norm."""
    u, v = to_norm_one(weight)
    return {f"{name}.weight_orig": 3 * weight, f"{name}.weight_u": u, f"{name}.weight_v": v}


def biggan_norm(name: str, weight: Tensor) -> State:
    """A layer with BigGAN-PyTorch's spectral norm. The length of u0 does not matter."""
    u, _ = to_norm_one(weight)
    return {f"{name}.weight": 3 * weight, f"{name}.u0": 5 * u[None], f"{name}.sv0": torch.ones(1)}


def to_norm_one(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Divide a weight [out, …] by its spectral norm in place, and return its first singular vectors."""
    left, values, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    weight.div_(values[0])
    return left[:, 0].float(), right[0].float()


def layer(name: str, module: SpectralNorm, weight: Weight) -> State:
    """The tensors of a layer. Its weight is [out, in, …] in other projects."""
    ours: tuple[int, ...] = (0, 2, 3, 1) if module.weight.dim() == 4 else (0, 1)
    theirs: tuple[int, ...] = (0, 3, 1, 2) if module.weight.dim() == 4 else (0, 1)
    flipped: tuple[int, ...] = ()
    if isinstance(module, TransposedConv2d):
        ours, theirs, flipped = (1, 2, 3, 0), (3, 0, 1, 2), (2, 3)
    kernel = module.weight.permute(theirs).flip(flipped).contiguous()
    state = weight(name, kernel)
    module.weight.copy_(kernel.flip(flipped).permute(ours))
    return state | ({f"{name}.bias": module.bias.clone()} if module.bias is not None else {})


def blocks_of(generator: Generator) -> list[GeneratorBlock | SelfAttention]:
    return [block for block in generator.blocks if isinstance(block, GeneratorBlock | SelfAttention)]


def first_norm(generator: Generator) -> BatchNorm:
    block = blocks_of(generator)[0]
    assert isinstance(block, GeneratorBlock)
    return block.norm1


def statistics(name: str, norm: BatchNorm, names: tuple[str, str] = ("running_mean", "running_var")) -> State:
    return {f"{name}.{names[0]}": norm.running_mean.clone(), f"{name}.{names[1]}": norm.running_var.clone()}


def attention(names: dict[str, str], module: SelfAttention, weight: Weight) -> State:
    state: State = {}
    for which, name in names.items():
        state |= layer(name, getattr(module, which), weight)
    return state


def biggan_pytorch(
    generator: Generator, weight: Weight = biggan_norm, *, shared: int = 0, inside: bool = False
) -> State:
    """The state dict of BigGAN-PyTorch.

    `shared` is the width of a shared embedding, or 0. `inside` puts the statistics into a layer inside, as --mybn does.
    """
    embedding = torch.randn(len(first_norm(generator).weight), shared)
    own = ("stored_mean", "stored_var")

    def norm(name: str, module: BatchNorm) -> State:
        state: State = statistics(f"{name}.bn" if inside else name, module, own)
        state |= {f"{name}.bn.accumulation_counter": torch.zeros(1)} if inside else {}
        if name.startswith("output"):
            return state | {f"{name}.gain": module.weight.clone(), f"{name}.bias": module.bias.clone()}
        for which, table, offset in (("gain", module.weight, 1), ("bias", module.bias, 0)):
            if shared:
                matrix = torch.randn(table.shape[1], shared)
                state |= weight(f"{name}.{which}", matrix)
                table.copy_(embedding @ matrix.t() + offset)
            else:
                state |= plain(f"{name}.{which}", table - offset)
        return state

    state = {"shared.weight": embedding} if shared else {}
    state |= layer("linear", generator.linear, weight)
    stage = -1
    for block in blocks_of(generator):
        if isinstance(block, GeneratorBlock):
            stage += 1
            name = f"blocks.{stage}.0"
            for which, module in (("conv1", block.conv1), ("conv2", block.conv2), ("conv_sc", block.skip)):
                state |= layer(f"{name}.{which}", module, weight)
            state |= norm(f"{name}.bn1", block.norm1) | norm(f"{name}.bn2", block.norm2)
        else:
            name = f"blocks.{stage}.1"
            names = {"theta": f"{name}.theta", "phi": f"{name}.phi", "g": f"{name}.g", "out": f"{name}.o"}
            state |= attention(names, block, weight) | {f"{name}.gamma": block.gamma.clone()}
    return state | norm("output_layer.0", generator.norm) | layer("output_layer.2", generator.conv, weight)


def mmgeneration(
    generator: Generator, weight: Weight = torch_norm, tables: Weight = plain, *, offset: int = 1, bgr: bool = True
) -> State:
    """The state dict of mmgeneration's generator."""

    def norm(name: str, module: BatchNorm) -> State:
        state = statistics(f"{name}.norm", module) | {f"{name}.norm.num_batches_tracked": torch.tensor(9)}
        if module.weight.dim() == 1:
            return state | {f"{name}.norm.weight": module.weight.clone(), f"{name}.norm.bias": module.bias.clone()}
        for which, table, added in (("weight", module.weight, offset), ("bias", module.bias, 0)):
            stored = table - added
            state |= tables(f"{name}.{which}_embedding", stored)
            table.copy_(stored + added)
        return state

    ends = plain if weight is plain else torch_norm
    state = layer("noise2feat", generator.linear, ends)
    for number, block in enumerate(blocks_of(generator)):
        name = f"conv_blocks.{number}"
        if isinstance(block, GeneratorBlock):
            for which, module in (("conv_1", block.conv1), ("conv_2", block.conv2), ("shortcut", block.skip)):
                state |= layer(f"{name}.{which}.conv", module, weight)
            state |= norm(f"{name}.norm_1", block.norm1) | norm(f"{name}.norm_2", block.norm2)
        else:
            names = {which: f"{name}.{which}.conv" for which in ("theta", "phi", "g")} | {"out": f"{name}.o.conv"}
            state |= attention(names, block, weight) | {f"{name}.gamma": block.gamma.clone()}
    last = layer("to_rgb.conv", generator.conv, ends)
    if bgr:
        last = {key: value if key.endswith("_v") else value.flip(0) for key, value in last.items()}
    state |= statistics("to_rgb.bn", generator.norm) | last
    return state | {"to_rgb.bn.weight": generator.norm.weight.clone(), "to_rgb.bn.bias": generator.norm.bias.clone()}


def studiogan(generator: Generator, weight: Weight = torch_norm) -> State:
    """The state dict of StudioGAN's backbone `resnet`."""

    def norm(name: str, module: BatchNorm) -> State:
        if module.weight.dim() == 1:
            own = {f"{name}.weight": module.weight.clone(), f"{name}.bias": module.bias.clone()}
            return statistics(name, module) | own | {f"{name}.num_batches_tracked": torch.tensor(9)}
        state = statistics(f"{name}.bn", module)
        for which, table, added in (("gain", module.weight, 1), ("bias", module.bias, 0)):
            stored = (table - added).t().contiguous()
            state |= weight(f"{name}.{which}", stored)
            table.copy_(stored.t() + added)
        return state

    state = layer("linear0", generator.linear, weight)
    for number, block in enumerate(blocks_of(generator)):
        name = f"blocks.{number}.0"
        if isinstance(block, GeneratorBlock):
            for which, module in (("conv2d1", block.conv1), ("conv2d2", block.conv2), ("conv2d0", block.skip)):
                state |= layer(f"{name}.{which}", module, weight)
            state |= norm(f"{name}.bn1", block.norm1) | norm(f"{name}.bn2", block.norm2)
        else:
            names = {which: f"{name}.conv1x1_{which}" for which in ("theta", "phi", "g")}
            state |= attention(names | {"out": f"{name}.conv1x1_attn"}, block, weight)
            state |= {f"{name}.sigma": block.gamma[None].clone()}
    return state | norm("bn4", generator.norm) | layer("conv2d5", generator.conv, weight)


def official_tf(generator: Generator) -> State:
    """The variables of the official code. Kernels are [height, width, in, out], and feature maps are [4, 4, C]."""

    def weight(name: str, value: Tensor) -> State:
        u, _ = to_norm_one(value)
        stored = value.permute(2, 3, 1, 0) if value.dim() == 4 else value.t()
        return {name: 3 * stored.contiguous(), f"{name.rpartition('/')[0]}/u": u[None]}

    def conv(name: str, module: SpectralNorm) -> State:
        state = layer(f"{name}/w", module, weight)
        if module.bias is not None:
            state[f"{name}/biases"] = state.pop(f"{name}/w.bias")
        return {f"model/g_{key}": value for key, value in state.items()}

    def norm(name: str, module: BatchNorm, names: tuple[str, str], shape: tuple[int, ...]) -> State:
        keys = ("gamma", "beta", *names)
        values = (module.weight, module.bias, module.running_mean.view(shape), module.running_var.view(shape))
        return {f"model/g_{name}/{key}": value.clone() for key, value in zip(keys, values, strict=True)}

    channels = generator.linear.weight.shape[0] // 16
    rows = torch.arange(16 * channels).view(channels, 4, 4).permute(1, 2, 0).flatten()
    matrix = generator.linear.weight
    to_norm_one(matrix)
    state = {f"model/g_{key}": value for key, value in weight("snh0/Matrix", matrix[rows]).items()}
    assert generator.linear.bias is not None
    state["model/g_snh0/bias"] = generator.linear.bias[rows]
    number = 0
    for block in blocks_of(generator):
        if isinstance(block, GeneratorBlock):
            number += 1
            for which, module in (("snconv1", block.conv1), ("snconv2", block.conv2), ("snconv3", block.skip)):
                state |= conv(f"block{number}/{which}", module)
            for which, batch_norm in (("cbn_0", block.norm1), ("cbn_1", block.norm2)):
                state |= norm(f"block{number}/{which}", batch_norm, ("mean", "var"), (1, 1, 1, -1))
        else:
            for which, name in (("theta", "theta"), ("phi", "phi"), ("g", "g"), ("out", "attn")):
                state |= conv(f"non_local/sn_conv_{name}", getattr(block, which))
            state["model/g_non_local/sigma_ratio"] = block.gamma.clone()
    state |= norm("bn", generator.norm, ("moving_mean", "moving_variance"), (-1,))
    state |= conv("snconv_last", generator.conv)
    slots = {f"{key}/Adam": torch.zeros_like(value) for key, value in state.items()}
    return state | slots | {"model/d_block1/w": torch.ones(2), "global_step": torch.tensor(5)}
