"""The residual controls of attention are their formula. The other blocks are compared in test_reference.py."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from sagan import spectral_norm
from sagan.blocks import ResidualControl
from sagan.config import Spectral
from tests.unit.sagan.float64 import EXACT, rand

FORMS = ("residual_1x1", "residual_3x3")


def control(form, channels=8, slope=0.2):
    layer = ResidualControl(channels, Spectral(), form, slope).double()
    torch.nn.init.constant_(layer.gamma, 0.7)
    spectral_norm.warm_up(layer)
    return layer


@pytest.mark.parametrize(("form", "hidden", "padding"), [("residual_1x1", 20, 0), ("residual_3x3", 2, 1)])
def test_a_control_equals_its_formula(form, hidden, padding):
    layer, x = control(form, 32), rand(2, 32, 5, 7)
    first, second = layer.conv1.kernel, layer.conv2.kernel
    assert first.shape == (hidden, 32, 2 * padding + 1, 2 * padding + 1)
    inner = F.leaky_relu(F.conv2d(F.leaky_relu(x, 0.2), first, padding=padding), 0.2)
    given = x.clone()
    torch.testing.assert_close(layer(x), x + 0.7 * F.conv2d(inner, second, padding=padding), **EXACT)
    assert torch.equal(x, given)  # the rectifiers in place leave the input alone


@pytest.mark.parametrize("form", FORMS)
def test_a_control_starts_as_the_identity(form):
    x = rand(1, 8, 4, 4)
    assert torch.equal(ResidualControl(8, Spectral(), form).double()(x), x)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form):
    assert gradcheck(control(form), rand(1, 8, 4, 4, grad=True))
