"""The official SAGAN and its step as a careful author would write them from the formulas, and no faster.

What the step benchmark compares with. Fair: one discriminator pass for real and fake images, no graph of the generator
in the discriminator's update, the discriminator frozen in the generator's. Plain: eager, contiguous, resampling and
convolution one after the other, attention written out, spectral norm by autograd through W / σ with a power iteration
in each forward, Adam and the average tensor by tensor.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagan import spectral_norm
from sagan.config import ModelConfig, OptimConfig


class _SpectralNorm(nn.Module):
    """u and v are constants; each forward moves them by one power iteration (where it `iterates`)."""

    weight: Tensor
    u: Tensor
    iterates = True

    def _start(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self.register_buffer("u", F.normalize(torch.randn(len(self.weight)), dim=0))

    def normalised(self) -> Tensor:
        matrix = self.weight.flatten(1)
        with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
            v = F.normalize(torch.mv(matrix.t(), self.u), dim=0)
            u = F.normalize(torch.mv(matrix, v), dim=0)
            if self.iterates:
                self.u.copy_(u)
        return self.weight / torch.dot(u, torch.mv(matrix, v))


class Conv(_SpectralNorm, nn.Conv2d):
    def __init__(self, in_: int, out: int, size: int, *, bias: bool = True) -> None:
        super().__init__(in_, out, size, padding=size // 2, bias=bias)
        self._start()
        if bias:
            nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalised(), self.bias, padding=self.padding)


class Linear(_SpectralNorm, nn.Linear):
    def __init__(self, in_: int, out: int) -> None:
        super().__init__(in_, out)
        self._start()
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised(), self.bias)


class Embedding(_SpectralNorm, nn.Embedding):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__(classes, width)
        self._start()

    def forward(self, y: Tensor) -> Tensor:
        return F.embedding(y, self.normalised())


class ConditionalBatchNorm(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False, momentum=0.001)
        self.weight = nn.Parameter(torch.ones(classes, channels))
        self.bias = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(x) * self.weight[y][..., None, None] + self.bias[y][..., None, None]


class SelfAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = Conv(channels, channels // 8, 1, bias=False)
        self.phi = Conv(channels, channels // 8, 1, bias=False)
        self.g = Conv(channels, channels // 2, 1, bias=False)
        self.out = Conv(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        keys = F.max_pool2d(self.phi(x), 2).flatten(2)
        values = F.max_pool2d(self.g(x), 2).flatten(2)
        beta = torch.softmax(torch.bmm(self.theta(x).flatten(2).transpose(1, 2), keys), dim=-1)
        return x + self.gamma * self.out(torch.bmm(values, beta.transpose(1, 2)).view(b, -1, h, w))


class GeneratorBlock(nn.Module):
    def __init__(self, in_: int, out: int, classes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalBatchNorm(in_, classes), ConditionalBatchNorm(out, classes)
        self.conv1, self.conv2, self.skip = Conv(in_, out, 3), Conv(out, out, 3), Conv(in_, out, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x, y)), scale_factor=2))
        return self.conv2(F.relu(self.norm2(h, y))) + self.skip(F.interpolate(x, scale_factor=2))


class Generator(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths, size = config.widths_g, 4
        self.linear = Linear(config.z_dim, 16 * widths[0])
        blocks: list[nn.Module] = []
        for in_, out in pairwise(widths):
            blocks.append(GeneratorBlock(in_, out, config.known_num_classes))
            size *= 2
            if size in config.attention_sizes:
                blocks.append(SelfAttention(out))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.BatchNorm2d(widths[-1], momentum=0.0001)
        self.conv = Conv(widths[-1], 3, 3)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        h = self.linear(z).view(len(z), -1, 4, 4)
        for block in self.blocks:
            h = block(h, y) if isinstance(block, GeneratorBlock) else block(h)
        return torch.tanh(self.conv(F.relu(self.norm(h))))


class DiscriminatorBlock(nn.Module):
    def __init__(self, in_: int, out: int, *, down: bool, first: bool) -> None:
        super().__init__()
        self.down, self.first = down, first
        self.conv1, self.conv2 = Conv(in_, out, 3), Conv(out, out, 3)
        self.skip = Conv(in_, out, 1) if down or in_ != out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if self.first:
            assert self.skip is not None
            return F.avg_pool2d(h, 2) + self.skip(F.avg_pool2d(x, 2))
        skip = x if self.skip is None else self.skip(x)
        return F.avg_pool2d(h, 2) + F.avg_pool2d(skip, 2) if self.down else h + skip


class Discriminator(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        in_, size = 3, config.known_resolution
        for out, down in config.widths_d:
            blocks.append(DiscriminatorBlock(in_, out, down=down, first=not blocks))
            in_, size = out, size // 2 if down else size
            if down and size in config.attention_sizes:
                blocks.append(SelfAttention(out))
        self.blocks = nn.Sequential(*blocks)
        self.linear, self.embedding = Linear(in_, 1), Embedding(config.known_num_classes, in_)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        features = F.relu(self.blocks(x)).sum((2, 3))
        return self.linear(features).squeeze(1) + (features * self.embedding(y)).sum(1)


def plain(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A weight of one of our layers, or its gradient, as the plain layer [out, in, height, width] has it."""
    if isinstance(layer, spectral_norm.TransposedConv2d):
        return tensor.permute(3, 0, 1, 2).flip(2, 3)
    return tensor.permute(0, 3, 1, 2) if isinstance(layer, spectral_norm.Conv2d) else tensor


@torch.no_grad()
def copy_from(ours: nn.Module, theirs: nn.Module) -> None:
    """Give the reference our weights and vectors, after which both compute with the same σ.

    Ours are moved by one power iteration, which the reference does in each forward, from the vectors before it.
    """
    weights = dict(theirs.named_parameters())
    for name, layer in ours.named_modules():
        for kind, parameter in layer.named_parameters(name, recurse=False):
            weights[kind].copy_(plain(layer, parameter) if kind.endswith("weight") else parameter)
    for name, layer in spectral_norm.layers(ours):
        reference = theirs.get_submodule(name)
        assert isinstance(reference, _SpectralNorm)
        reference.u.copy_(layer.u)
        reference.iterates = False
        spectral_norm.power_iteration([layer])


def gradients(ours: nn.Module, theirs: nn.Module) -> tuple[Tensor, Tensor]:
    """All gradients of both as one vector each, in the same order and layout."""
    expected = dict(theirs.named_parameters())
    pairs = []
    for name, layer in ours.named_modules():
        for kind, parameter in layer.named_parameters(name, recurse=False):
            grad, other = parameter.grad, expected[kind].grad
            assert grad is not None
            assert other is not None
            pairs.append(((plain(layer, grad) if kind.endswith("weight") else grad).flatten(), other.flatten()))
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])


class Step:
    """`step(real, y)`: one discriminator and one generator update, with fresh latents and labels for each."""

    def __init__(self, config: ModelConfig, optim: OptimConfig, device: str) -> None:
        self.config, self.decay, self.device = config, optim.ema_decay, device
        self.generator, self.discriminator = Generator(config).to(device), Discriminator(config).to(device)
        betas = (optim.beta1, optim.beta2)
        self.adam_g = torch.optim.Adam(self.generator.parameters(), optim.lr_g, betas, optim.eps, foreach=False)
        self.adam_d = torch.optim.Adam(self.discriminator.parameters(), optim.lr_d, betas, optim.eps, foreach=False)
        self.ema = {name: p.detach().clone() for name, p in self.generator.named_parameters()}

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        z = torch.randn(n, self.config.z_dim, device=self.device)
        return z, torch.randint(self.config.known_num_classes, (n,), device=self.device)

    def __call__(self, real: Tensor, y: Tensor) -> None:
        z, y_fake = self.draw(len(real))
        with torch.no_grad():
            fake = self.generator(z, y_fake)
        logit_real, logit_fake = self.discriminator(torch.cat([real, fake]), torch.cat([y, y_fake])).chunk(2)
        self.adam_d.zero_grad()
        (F.relu(1 - logit_real).mean() + F.relu(1 + logit_fake).mean()).backward()
        self.adam_d.step()

        z, y_fake = self.draw(len(real))
        self.discriminator.requires_grad_(False)
        loss = -self.discriminator(self.generator(z, y_fake), y_fake).mean()
        self.adam_g.zero_grad()
        loss.backward()
        self.discriminator.requires_grad_(True)
        self.adam_g.step()
        with torch.no_grad():
            for name, parameter in self.generator.named_parameters():
                self.ema[name].mul_(self.decay).add_(parameter, alpha=1 - self.decay)
