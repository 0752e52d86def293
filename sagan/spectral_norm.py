"""Spectral normalisation (Miyato et al. 2018). Power iterations run between steps, not inside the forward pass.

A layer divides its weight W by σ = uᵀWv. During training only `advance` moves u and v: it runs one power iteration and
recomputes σ. A training step calls it once after each optimiser step of a network. A forward pass changes nothing, so
it may be repeated, recomputed, compiled or run on one rank alone. Gradients flow through σ(W) = uᵀWv. They treat u and
v as constants, or flow through the power iteration too, as in the official code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagan.bias import convolve
from sagan.config import Spectral
from sagan.initial_weights import initial_weight
from sagan.ranks import World

# From a random u, σ reaches 80 % of its true value after one iteration and 99.8 % after thirty. So a network starts
# from a converged u.
WARM_UP_ITERATIONS = 30


class _DivideBySigma(torch.autograd.Function):
    """Compute W / σ in `dtype` for a matrix W.

    ∂σ/∂W is a sum of outer products. `factors` holds their vectors, in pairs.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, sigma: Tensor, dtype: torch.dtype, *factors: Tensor):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight, sigma, *factors)
        return torch.div(weight, sigma, out=torch.empty_like(weight, dtype=dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        weight, sigma, *factors = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        along = torch.dot(grad.flatten(), weight.flatten()) / sigma
        for left, right in zip(factors[::2], factors[1::2], strict=True):
            grad = torch.addr(grad, left * along, right, alpha=-1)
        return (grad.div_(sigma), None, None, *(None for _ in factors))


class SpectralNorm(nn.Module):
    """Base class of the layers below.

    Normalisation treats the weight as the matrix [out, everything else]. Parameters have the memory layout that the
    kernels read, so that no step flips or copies a weight. The weight of a convolution is [out, height, width, in].

    Args:
        weight: initial values of the weight.
        bias: length of the bias; 0 for no bias.
        spectral: parameters of the normalisation; None for a plain layer.
        transposed: whether the memory of the weight holds the transpose of the matrix.

    Attributes:
        u: left singular vector of the power iteration, [out].
        v: right singular vector of the power iteration, [everything else].
        sigma: σ, a scalar. It is not part of the state dict.
        u_before: u before the last power iteration. It exists where gradients flow through the iteration.
    """

    u: Tensor
    v: Tensor
    sigma: Tensor
    u_before: Tensor

    def __init__(self, weight: Tensor, bias: int, spectral: Spectral | None, *, transposed: bool = False) -> None:
        super().__init__()
        self.spectral, self.transposed = spectral, transposed
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(bias)) if bias else None
        if spectral is not None:
            rows, columns = self.matrix.shape
            self.register_buffer("u", F.normalize(torch.randn(rows), dim=0))
            self.register_buffer("v", torch.zeros(columns))
            # σ follows from W and v. The buffer saves forward passes from computing it.
            self.register_buffer("sigma", torch.ones(()), persistent=False)
            if spectral.through_iteration:
                self.register_buffer("u_before", self.u.clone())

    @property
    def known_spectral(self) -> Spectral:
        """Parameters of the normalisation of a normalised layer."""
        assert self.spectral is not None
        return self.spectral

    @property
    def _stored(self) -> Tensor:
        """Memory of the weight as a matrix."""
        return self.weight.flatten(0, -2) if self.transposed else self.weight.flatten(1)

    @property
    def matrix(self) -> Tensor:
        """Weight as the matrix [out, everything else], a detached view."""
        stored = self._stored.detach()
        return stored.t() if self.transposed else stored

    @property
    def normalised_weight(self) -> Tensor:
        """W / σ in the shape of the weight, in the dtype of autocast where autocast is on."""
        if self.spectral is None:
            return self.weight
        device = self.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        pairs = [(self.u, self.v)]
        if self.spectral.through_iteration:
            pairs.append((self.u_before, self._iteration_factor()))
        factors = [vector for pair in pairs for vector in (reversed(pair) if self.transposed else pair)]
        return _DivideBySigma.apply(self._stored, self.sigma, dtype, *factors).view_as(self.weight)

    @torch.no_grad()
    def _iteration_factor(self) -> Tensor:
        """Return w of ∂σ/∂W = u vᵀ + u₀ wᵀ, where u₀ is `u_before`.

        From σ = ‖Wv‖ and v = Wᵀu₀ / ‖Wᵀu₀‖ follows w = (1 − v vᵀ) Wᵀu / ‖Wᵀu₀‖.
        """
        transposed = self.matrix.t()
        with torch.autocast(self.weight.device.type, enabled=False):  # forward passes call this; w stays in float32
            pulled = torch.mv(transposed, self.u)
            return (pulled - self.v * torch.dot(self.v, pulled)) / torch.mv(transposed, self.u_before).norm()

    @torch.no_grad()
    def update_sigma(self) -> None:
        """Recompute σ from the present weight and v."""
        self.sigma.copy_(torch.mv(self.matrix, self.v).norm())


class Conv2d(SpectralNorm):
    """Convolution at stride 1 that keeps the size of the feature map. The weight is [out, height, width, in]."""

    def __init__(self, in_: int, out: int, size: int, spectral: Spectral | None, *, bias: bool = True) -> None:
        weight = _standard_layout(initial_weight(out, in_, size, size).permute(0, 2, 3, 1))
        super().__init__(weight, out if bias else 0, spectral)

    @property
    def kernel(self) -> Tensor:
        """W / σ as [out, in, height, width], channels last in memory."""
        return self.normalised_weight.permute(0, 3, 1, 2)

    def forward(self, x: Tensor, slope: float | None = None) -> Tensor:
        """Convolve x, and rectify the result where `slope` is not None."""
        return convolve(F.conv2d, x, self.kernel, self.bias, slope, padding=self.weight.shape[1] // 2)


class TransposedConv2d(SpectralNorm):
    """3×3 convolution in the form that `resample.up_conv` takes.

    The weight is [in, height, width, out], flipped in height and width. σ equals the σ of the plain convolution.
    """

    def __init__(self, in_: int, out: int, spectral: Spectral | None) -> None:
        weight = _standard_layout(initial_weight(out, in_, 3, 3).permute(1, 2, 3, 0))
        super().__init__(weight, out, spectral, transposed=True)

    @property
    def kernel(self) -> Tensor:
        """W / σ as [in, out, height, width], channels last in memory."""
        return self.normalised_weight.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input, in pixels. `side` is the side of its kernel."""

    side: int
    stride: int
    padding: int
    output_padding: int = 0


class StridedConv2d(SpectralNorm):
    """Convolution with a window of its own (DCGAN, AC-GAN). The weight is [out, height, width, in]."""

    def __init__(self, in_: int, out: int, spectral: Spectral | None, window: Window, *, bias: bool = True) -> None:
        weight = initial_weight(out, in_, window.side, window.side).permute(0, 2, 3, 1)
        super().__init__(_standard_layout(weight), out if bias else 0, spectral)
        self.options = {"stride": window.stride, "padding": window.padding}

    def forward(self, x: Tensor) -> Tensor:
        return convolve(F.conv2d, x, self.normalised_weight.permute(0, 3, 1, 2), self.bias, **self.options)


class StridedTransposedConv2d(SpectralNorm):
    """Transposed convolution with a window of its own (DCGAN, AC-GAN). The weight is [in, height, width, out]."""

    def __init__(self, in_: int, out: int, spectral: Spectral | None, window: Window, *, bias: bool = True) -> None:
        weight = initial_weight(out, in_, window.side, window.side).permute(1, 2, 3, 0)
        super().__init__(_standard_layout(weight), out if bias else 0, spectral, transposed=True)
        self.options = {"stride": window.stride, "padding": window.padding, "output_padding": window.output_padding}

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.normalised_weight.permute(0, 3, 1, 2)
        return convolve(F.conv_transpose2d, x, kernel, self.bias, **self.options)


class Linear(SpectralNorm):
    """Linear layer with a bias. The weight is [out, in]."""

    def __init__(self, in_: int, out: int, spectral: Spectral | None) -> None:
        super().__init__(initial_weight(out, in_), out, spectral)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised_weight, self.bias)


class Embedding(SpectralNorm):
    """Table of one vector per class. The weight is [num_classes, width]."""

    def __init__(self, num_classes: int, width: int, spectral: Spectral | None) -> None:
        super().__init__(initial_weight(num_classes, width), 0, spectral)

    def forward(self, y: Tensor) -> Tensor:
        return F.embedding(y, self.normalised_weight)


def _standard_layout(weight: Tensor) -> Tensor:
    """Return a copy of the weight whose strides follow its shape.

    `contiguous` leaves other strides on sides of length 1, and DDP then copies gradients.
    """
    return weight.clone(memory_format=torch.contiguous_format)


def layers(network: nn.Module) -> Iterator[tuple[str, SpectralNorm]]:
    """Yield the name and the layer of every normalised layer of a network."""
    return ((n, m) for n, m in network.named_modules() if isinstance(m, SpectralNorm) and m.spectral is not None)


@torch.no_grad()
def power_iteration(normalised: list[SpectralNorm]) -> None:
    """Run one power iteration of each layer: v ← Wᵀu and u ← Wv, each scaled to length one. Set σ = ‖Wv‖ = uᵀWv."""
    for layer in normalised:
        if layer.known_spectral.through_iteration:
            layer.u_before.copy_(layer.u)
    pulled = [torch.mv(layer.matrix.t(), layer.u) for layer in normalised]
    _divide_by(list(torch._foreach_norm(pulled)), pulled, [layer.v for layer in normalised], normalised)
    pushed = [torch.mv(layer.matrix, layer.v) for layer in normalised]
    lengths = list(torch._foreach_norm(pushed))
    torch._foreach_copy_([layer.sigma for layer in normalised], lengths)
    _divide_by(lengths, pushed, [layer.u for layer in normalised], normalised)


def _divide_by(
    lengths: list[Tensor], vectors: list[Tensor], results: list[Tensor], normalised: list[SpectralNorm]
) -> None:
    """Write vector / max(length, eps) of each layer into its result."""
    torch._foreach_clamp_min_(lengths, [layer.known_spectral.eps for layer in normalised])
    for length, vector, result in zip(lengths, vectors, results, strict=True):
        torch.div(vector, length, out=result)


def warm_up(network: nn.Module, iterations: int = WARM_UP_ITERATIONS) -> None:
    """Run power iterations on the present weights, so that u, v and σ converge."""
    if normalised := [layer for _, layer in layers(network)]:
        for _ in range(iterations):
            power_iteration(normalised)


def refresh(network: nn.Module) -> None:
    """Recompute σ of every layer from W and v. Call it after loading them."""
    for _, layer in layers(network):
        layer.update_sigma()


@torch.no_grad()
def advance(network: nn.Module, world: World) -> None:
    """Run one power iteration of every layer on the present weights.

    Afterwards all ranks have the u, v and σ of rank 0, bit for bit. Call it outside autocast: in bfloat16, σ would be
    off by 0.2 %.
    """
    if not (normalised := [layer for _, layer in layers(network)]):
        return
    power_iteration(normalised)
    if world.size > 1:
        vectors = [vector for layer in normalised for vector in (layer.u, layer.v, layer.sigma[None])]
        flat = world.broadcast_(torch.cat(vectors))
        torch._foreach_copy_(vectors, flat.split([len(vector) for vector in vectors]))


@torch.no_grad()
def fold(network: nn.Module) -> dict[str, Tensor]:
    """Return the network's state dict with W / σ in place of W, without u, v and `u_before`.

    The same network without spectral norm can load it.
    """
    state = dict(network.state_dict())
    for name, layer in layers(network):
        prefix = f"{name}." if name else ""
        state[f"{prefix}weight"] = layer.weight / layer.sigma
        for vector in ("u", "v", "u_before"):
            state.pop(f"{prefix}{vector}", None)
    return state
