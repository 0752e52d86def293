"""Spectral normalisation (Miyato et al. 2018), advanced between steps instead of inside the forward pass.

A layer divides its weight W by σ = uᵀWv. Only `advance`, called once after each optimiser step of a network, moves u
and v by one power iteration and recomputes σ. A forward pass changes nothing, so it may be repeated, recomputed,
compiled or run on one rank alone. Gradients flow through σ(W) = uᵀWv with u and v constant, or through the power
iteration as well, as the official code's do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagan.world import World

# A random u sees 80 % of the true σ after one iteration, 99.8 % after thirty: a network starts from a converged one.
WARM_UP_ITERATIONS = 30


@dataclass(frozen=True)
class Spectral:
    """How a layer is normalised; None in its place is a layer that is not.

    Attributes:
        eps: least length that a vector is divided by.
        through_iteration: gradients flow through u and v too (official code) instead of holding them constant.
    """

    eps: float = 1e-12
    through_iteration: bool = False


class _DivideBySigma(torch.autograd.Function):
    """W / σ in `dtype` for a matrix W, given ∂σ/∂W as a sum of outer products: pairs of vectors in `factors`."""

    @staticmethod
    def forward(ctx, weight: Tensor, sigma: Tensor, dtype: torch.dtype, *factors: Tensor):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weight, sigma, *factors)
        return (weight / sigma).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        weight, sigma, *factors = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        along = torch.dot(grad.flatten(), weight.flatten()) / sigma
        for left, right in zip(factors[::2], factors[1::2], strict=True):
            grad = torch.addr(grad, left * -along, right)
        return (grad.div_(sigma), None, None, *(None for _ in factors))


class SpectralNorm(nn.Module):
    """Base of the layers below; without `spectral` they are plain.

    The weight is seen as the matrix [out, everything else]; u has length out. Parameters lie in memory as the kernels
    read them, so that no step flips or copies a weight: a convolution's is [out, height, width, in].

    Args:
        weight: initial values.
        bias: its length; 0 for none.
        transposed: the weight's memory holds the matrix's transpose.
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
            # σ follows from W and v; it is kept so that no forward pass computes it
            self.register_buffer("sigma", torch.ones(()), persistent=False)
            if spectral.through_iteration:
                self.register_buffer("u_before", self.u.clone())

    @property
    def _stored(self) -> Tensor:
        """The weight's memory as a matrix."""
        return self.weight.flatten(0, -2) if self.transposed else self.weight.flatten(1)

    @property
    def matrix(self) -> Tensor:
        """[out, everything else], a view of the weight."""
        stored = self._stored.detach()
        return stored.t() if self.transposed else stored

    @property
    def normalised_weight(self) -> Tensor:
        """W / σ, in autocast's type where that is on."""
        if self.spectral is None:
            return self.weight
        device = self.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        pairs = [(self.u, self.v)]
        if self.spectral.through_iteration:
            pairs.append((self.u_before, self._through_v()))
        factors = [vector for pair in pairs for vector in (reversed(pair) if self.transposed else pair)]
        return _DivideBySigma.apply(self._stored, self.sigma, dtype, *factors).view_as(self.weight)

    @torch.no_grad()
    def _through_v(self) -> Tensor:
        """w of ∂σ/∂W = u vᵀ + u₀ wᵀ: σ = ‖Wv‖ with v = Wᵀu₀ / ‖Wᵀu₀‖ gives w = (1 − v vᵀ) Wᵀu / ‖Wᵀu₀‖."""
        matrix = self.matrix
        pulled = torch.mv(matrix.t(), self.u)
        return (pulled - self.v * torch.dot(self.v, pulled)) / torch.mv(matrix.t(), self.u_before).norm()

    @torch.no_grad()
    def power_iteration(self) -> None:
        """v ← Wᵀu, u ← Wv, both to length one; σ = ‖Wv‖ = uᵀWv."""
        assert self.spectral is not None
        if self.spectral.through_iteration:
            self.u_before = self.u
        self.v = F.normalize(torch.mv(self.matrix.t(), self.u), dim=0, eps=self.spectral.eps)
        pushed = torch.mv(self.matrix, self.v)
        self.sigma = pushed.norm()
        self.u = pushed / self.sigma.clamp(min=self.spectral.eps)

    @torch.no_grad()
    def update_sigma(self) -> None:
        """σ of the present weights and v."""
        self.sigma = torch.mv(self.matrix, self.v).norm()


class Conv2d(SpectralNorm):
    """Convolution at stride 1 that keeps the size of the map; the weight is [out, height, width, in]."""

    def __init__(self, in_: int, out: int, size: int, spectral: Spectral | None, *, bias: bool = True) -> None:
        weight = _laid_out(_glorot(out, in_, size, size).permute(0, 2, 3, 1))
        super().__init__(weight, out if bias else 0, spectral)

    @property
    def kernel(self) -> Tensor:
        """W / σ as [out, in, height, width], channels last in memory."""
        return self.normalised_weight.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, self.bias, padding=self.weight.shape[1] // 2)


class TransposedConv2d(SpectralNorm):
    """A 3×3 convolution in the form `resample.up_conv` takes; the weight is [in, height, width, out], flipped.

    σ is that of the convolution.
    """

    def __init__(self, in_: int, out: int, spectral: Spectral | None) -> None:
        weight = _laid_out(_glorot(out, in_, 3, 3).permute(1, 2, 3, 0))
        super().__init__(weight, out, spectral, transposed=True)

    @property
    def kernel(self) -> Tensor:
        """W / σ as [in, out, height, width], channels last in memory."""
        return self.normalised_weight.permute(0, 3, 1, 2)


class Linear(SpectralNorm):
    def __init__(self, in_: int, out: int, spectral: Spectral | None) -> None:
        super().__init__(_glorot(out, in_), out, spectral)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised_weight, self.bias)


class Embedding(SpectralNorm):
    def __init__(self, classes: int, width: int, spectral: Spectral | None) -> None:
        super().__init__(_glorot(classes, width), 0, spectral)

    def forward(self, y: Tensor) -> Tensor:
        return F.embedding(y, self.normalised_weight)


def _laid_out(weight: Tensor) -> Tensor:
    """In memory as indexed: `contiguous` leaves odd strides on sides of length 1, and then DDP copies gradients."""
    return weight.clone(memory_format=torch.contiguous_format)


def _glorot(*shape: int) -> Tensor:
    """Glorot uniform (official code), for a weight [out, in, …]."""
    return nn.init.xavier_uniform_(torch.empty(shape))


def layers(network: nn.Module) -> Iterator[tuple[str, SpectralNorm]]:
    """The normalised layers of a network with their names."""
    return ((n, m) for n, m in network.named_modules() if isinstance(m, SpectralNorm) and m.spectral is not None)


def warm_up(network: nn.Module, iterations: int = WARM_UP_ITERATIONS) -> None:
    """Converge u on the present weights, and σ with it."""
    for _, layer in layers(network):
        for _ in range(iterations):
            layer.power_iteration()


def refresh(network: nn.Module) -> None:
    """Recompute σ from W and v as they are: after loading them."""
    for _, layer in layers(network):
        layer.update_sigma()


@torch.no_grad()
def advance(network: nn.Module, world: World) -> None:
    """One power iteration of every layer on the present weights; all ranks end with rank 0's u, v and σ, bit for bit.

    Runs outside autocast: in bfloat16 σ would be off by 0.2 %.
    """
    normalised = [layer for _, layer in layers(network)]
    for layer in normalised:
        layer.power_iteration()
    if world.size > 1 and normalised:
        vectors = [vector for layer in normalised for vector in (layer.u, layer.v, layer.sigma[None])]
        flat = world.broadcast_(torch.cat(vectors))
        parts = iter(flat.split([len(vector) for vector in vectors]))
        for layer in normalised:
            layer.u, layer.v, layer.sigma = next(parts), next(parts), next(parts)[0]


@torch.no_grad()
def fold(network: nn.Module) -> dict[str, Tensor]:
    """The network's state with W / σ for each W, and without vectors: what the same network without norm loads."""
    state = dict(network.state_dict())
    for name, layer in layers(network):
        prefix = f"{name}." if name else ""
        state[f"{prefix}weight"] = layer.weight / layer.sigma
        for vector in ("u", "v", "u_before"):
            state.pop(f"{prefix}{vector}", None)
    return state
