"""Self-attention is its formula, in every form."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from sagan import spectral_norm
from sagan.attention import SelfAttention
from sagan.config import Spectral
from tests.unit.sagan.float64 import EXACT, rand


def attention(channels=8, form="released"):
    layer = SelfAttention(channels, Spectral(), form).double()
    torch.nn.init.constant_(layer.gamma, 0.7)
    spectral_norm.warm_up(layer)
    return layer


def parts(layer, x, form):
    """(θ, φ, g) [b, positions, channels], pooled as the form says, with plain matrix products."""
    pool = (lambda h: F.max_pool2d(h, 2)) if form == "released" else lambda h: h
    theta, phi, g = (F.conv2d(x, part.kernel) for part in (layer.theta, layer.phi, layer.g))
    return [h.flatten(2).transpose(1, 2) for h in (theta, pool(phi), pool(g))]


@pytest.fixture(params=["maps", "blockwise"])
def attends(request, monkeypatch):
    """Whether the layer computes its maps, or attends block by block as in bfloat16 on CUDA."""
    monkeypatch.setattr("sagan.attention._attends_blockwise", lambda values: request.param == "blockwise")


@pytest.mark.usefixtures("attends")
@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=["even", "odd"])
@pytest.mark.parametrize("form", ["released", "icml", "first"])
def test_attention_equals_its_formula_and_unscaled_dot_product_attention(form, size):
    layer, x = attention(16, form), rand(2, 16, *size, grad=True)
    theta, phi, g = parts(layer, x, form)
    beta = torch.softmax(torch.einsum("bqc,bkc->bqk", theta, phi), dim=-1)
    direction = torch.randn_like(x)
    ours = layer(x)
    (ours_grad,) = torch.autograd.grad(ours, x, direction)
    for attended in (beta @ g, F.scaled_dot_product_attention(theta, phi, g, scale=1.0)):
        maps = attended.transpose(1, 2).reshape(2, -1, *size)
        expected = x + layer.gamma * (F.conv2d(maps, layer.out.kernel) if layer.out else maps)
        torch.testing.assert_close(ours, expected, **EXACT)
        (grad,) = torch.autograd.grad(expected, x, direction, retain_graph=True)
        torch.testing.assert_close(ours_grad, grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("form", "keys"), [("released", 4), ("icml", 16), ("first", 16)])
def test_rows_of_the_map_sum_to_one(form, keys):
    maps = attention(form=form).maps(rand(2, 8, 4, 4))
    assert maps.shape == (2, 16, keys)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 16, dtype=torch.float64), **EXACT)


def test_attention_starts_as_the_identity():
    x = rand(1, 8, 4, 4)
    assert torch.equal(SelfAttention(8, Spectral()).double()(x), x)


@pytest.mark.usefixtures("attends")
@pytest.mark.parametrize("form", ["released", "icml", "first"])
def test_gradients_are_those_of_finite_differences(form):
    assert gradcheck(attention(form=form), rand(1, 8, 4, 4, grad=True))
