"""Every layer is divided by σ, its gradient is that of the quotient, and folding gives the same function."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from sagan import spectral_norm
from sagan.config import Spectral
from sagan.ranks import World
from tests.unit.sagan.float64 import EXACT, rand

CONVERGED = Spectral()
THROUGH = Spectral(through_iteration=True)


def every_layer(spectral=CONVERGED):
    return [
        pytest.param(layer, id=type(layer).__name__)
        for layer in (
            spectral_norm.Conv2d(5, 7, 3, spectral),
            spectral_norm.TransposedConv2d(5, 7, spectral),
            spectral_norm.Linear(9, 4, spectral),
            spectral_norm.Embedding(6, 11, spectral),
        )
    ]


@pytest.mark.parametrize("layer", every_layer())
def test_sigma_converges_to_the_largest_singular_value(layer):
    layer.double()
    torch.nn.init.normal_(layer.weight)  # random weights: orthogonal ones hide every mistake
    spectral_norm.warm_up(layer, 500)
    largest = torch.linalg.svdvals(layer.matrix)[0]
    assert abs(layer.sigma / largest - 1) < 0.01
    assert (layer.normalised_weight * layer.sigma - layer.weight).abs().max() < 1e-12


def test_sigma_of_an_upsampling_convolution_is_that_of_its_plain_form():
    plain, transposed = (
        kind.double()
        for kind in (
            spectral_norm.Conv2d(5, 7, 3, CONVERGED),
            spectral_norm.TransposedConv2d(5, 7, CONVERGED),
        )
    )
    with torch.no_grad():
        transposed.weight.copy_(plain.weight.permute(3, 1, 2, 0).flip(1, 2))
        transposed.u.copy_(plain.u)
    for layer in (plain, transposed):
        spectral_norm.warm_up(layer, 3)
    torch.testing.assert_close(transposed.sigma, plain.sigma, **EXACT)


@pytest.mark.parametrize("size", [1, 3])
def test_weights_lie_in_memory_as_they_are_indexed(size):
    """On sides of length 1 too, or DDP's buckets have other strides than the gradients, which it copies then."""
    weight = spectral_norm.Conv2d(6, 4, size, CONVERGED).weight
    assert weight.stride() == torch.empty(weight.shape).stride()


def test_a_forward_changes_nothing_and_an_advance_does():
    layer = spectral_norm.Conv2d(3, 4, 3, CONVERGED)
    spectral_norm.warm_up(layer, 1)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.train()(torch.randn(2, 3, 5, 5))
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    spectral_norm.advance(layer, World())
    assert not torch.equal(before["u"], layer.u)


@pytest.mark.parametrize("layer", every_layer())
def test_gradients_flow_through_sigma_with_u_and_v_constant(layer):
    layer.double()
    spectral_norm.warm_up(layer, 3)
    _same_gradient(layer, lambda matrix: torch.dot(layer.u, matrix @ layer.v))


@pytest.mark.parametrize("layer", every_layer(THROUGH))
def test_gradients_flow_through_the_iteration_where_asked(layer):
    """The official code's: σ of one power iteration from the vector before, differentiated as a whole."""
    layer.double()
    spectral_norm.warm_up(layer, 2)  # far from convergence, where the two gradients differ
    before = layer.u_before

    def sigma(matrix):
        v = F.normalize(matrix.t() @ before, dim=0)
        u = F.normalize(matrix @ v, dim=0)
        return torch.dot(u, matrix @ v)

    _same_gradient(layer, sigma)
    constant = torch.outer(layer.u, layer.v)
    matrix = layer.matrix.clone().requires_grad_()
    (through,) = torch.autograd.grad(sigma(matrix), matrix)
    assert (through - constant).norm() / constant.norm() > 0.01


def _same_gradient(layer, sigma):
    direction = torch.randn_like(layer.weight)
    (ours,) = torch.autograd.grad((layer.normalised_weight * direction).sum(), layer.weight)
    weight = layer.weight.detach().requires_grad_()
    matrix = weight.flatten(0, -2).t() if layer.transposed else weight.flatten(1)
    (theirs,) = torch.autograd.grad((weight / sigma(matrix) * direction).sum(), weight)
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_gradients_are_those_of_finite_differences():
    """σ moves with W under finite differences, as the backward pass says it does."""
    u, v = F.normalize(rand(3), dim=0), F.normalize(rand(5), dim=0)

    def normalised(weight):
        return spectral_norm._DivideBySigma.apply(weight, torch.dot(u, weight.detach() @ v), weight.dtype, u, v)

    assert gradcheck(normalised, rand(3, 5, grad=True))


@pytest.mark.parametrize("layer", every_layer())
def test_folding_gives_the_same_function_without_norm(layer):
    spectral_norm.warm_up(layer, 3)
    folded = spectral_norm.fold(layer)
    assert set(folded) == {name for name, _ in layer.named_parameters()}
    assert torch.equal(folded["weight"], layer.normalised_weight)


def test_bfloat16_touches_the_kernel_but_not_sigma():
    layer = spectral_norm.Conv2d(3, 4, 3, CONVERGED)
    spectral_norm.warm_up(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.kernel.dtype == torch.bfloat16
        exact = layer.weight / layer.sigma
    assert torch.equal(layer.kernel.permute(0, 2, 3, 1), exact)
    assert layer.sigma.dtype == torch.float32
