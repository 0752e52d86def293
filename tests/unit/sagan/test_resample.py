"""Resampling folded into convolutions equals resampling and convolution one after the other."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from sagan.resample import conv_down, double, halve, up_conv
from tests.unit.sagan.float64 import EXACT, rand


@pytest.fixture(params=["map", "weight"])
def filtered(request, monkeypatch):
    """Where the box filter runs. CUDA filters the weight, other devices the map."""
    monkeypatch.setattr("sagan.resample._filters_weight", lambda x, side: request.param == "weight")


@pytest.mark.usefixtures("filtered")
@pytest.mark.parametrize("size", [2, 4, 7])
def test_up_conv_equals_nearest_upsampling_then_convolution(size):
    x, w, b = rand(2, 3, size, size, grad=True), rand(5, 3, 3, 3, grad=True), rand(5, grad=True)
    ours = up_conv(x, w.flip(2, 3).transpose(0, 1), b)
    naive = F.conv2d(F.interpolate(x, scale_factor=2), w, b, padding=1)
    _same(ours, naive, (x, w, b))


@pytest.mark.usefixtures("filtered")
@pytest.mark.parametrize("size", [2, 4, 8])
def test_conv_down_equals_convolution_then_averaging(size):
    x, w, b = rand(2, 3, size, size, grad=True), rand(5, 3, 3, 3, grad=True), rand(5, grad=True)
    ours, naive = conv_down(x, w, b), F.avg_pool2d(F.conv2d(x, w, b, padding=1), 2)
    _same(ours, naive, (x, w, b))


@pytest.mark.parametrize("resample", [double, halve])
def test_gradients_of_the_filters(resample):
    assert gradcheck(resample, rand(2, 3, 4, 6, grad=True))


@pytest.mark.usefixtures("filtered")
def test_gradients_of_the_folded_convolutions():
    x, w, b = rand(1, 2, 4, 4, grad=True), rand(2, 2, 3, 3, grad=True), rand(2, grad=True)
    assert gradcheck(up_conv, (x, w, b))
    assert gradcheck(conv_down, (x, w, b))


def _same(ours, naive, inputs):
    torch.testing.assert_close(ours, naive, **EXACT)
    direction = torch.randn_like(naive)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(naive, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
