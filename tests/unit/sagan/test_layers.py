"""Custom layers equal their formulas: values in float64 to rounding, gradients by finite differences."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from sagan import batch_norm, losses, spectral_norm
from sagan.attention import SelfAttention
from sagan.batch_norm import BatchNorm, ConditionalBatchNorm, Groups
from sagan.resample import conv_down, up_conv
from sagan.world import World

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 against float64 in another order of operations


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def rand(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


class TestSpectralNorm:
    @pytest.mark.parametrize(
        "layer",
        [
            spectral_norm.Conv2d(5, 7, 3),
            spectral_norm.Linear(9, 4),
            spectral_norm.Embedding(6, 11),
        ],
    )
    def test_sigma_converges_to_the_largest_singular_value(self, layer):
        layer.double()
        torch.nn.init.normal_(layer.weight)  # random weights: orthogonal ones hide every mistake
        spectral_norm.warm_up(layer, 500)
        largest = torch.linalg.svdvals(layer.weight.flatten(1))[0]
        assert abs(layer.sigma / largest - 1) < 0.01
        assert torch.linalg.svdvals(layer.normalised_weight.flatten(1))[0] < 1.01

    def test_a_forward_changes_nothing_and_an_advance_does(self):
        layer = spectral_norm.Conv2d(3, 4, 3)
        spectral_norm.warm_up(layer, 1)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.train()(torch.randn(2, 3, 5, 5))
        assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
        spectral_norm.advance(layer, World())
        assert not torch.equal(before["u"], layer.u)

    def test_gradients_flow_through_sigma_with_u_and_v_constant(self):
        layer = spectral_norm.Linear(4, 3).double()
        spectral_norm.warm_up(layer)
        u, v = layer.u, layer.v

        def normalised(weight):
            # σ must follow W for finite differences to see it, as it does between two steps
            return spectral_norm._DivideBySigma.apply(weight, u, v, torch.dot(u, weight.detach() @ v))

        def formula(weight):
            return weight / torch.dot(u, weight @ v)

        weight = layer.weight.detach().requires_grad_()
        direction = rand(3, 4)
        (ours,) = torch.autograd.grad((normalised(weight) * direction).sum(), weight)
        (theirs,) = torch.autograd.grad((formula(weight) * direction).sum(), weight)
        torch.testing.assert_close(ours, theirs, **EXACT)

    def test_folding_gives_the_same_function_without_norm(self):
        layer = spectral_norm.Conv2d(3, 4, 3).double()
        spectral_norm.warm_up(layer, 3)
        plain = spectral_norm.Conv2d(3, 4, 3, spectral_norm=False).double()
        plain.load_state_dict(spectral_norm.fold(layer))
        x = rand(2, 3, 6, 6)
        torch.testing.assert_close(layer(x), plain(x), **EXACT)


class TestResampling:
    @pytest.mark.parametrize("size", [2, 4, 7])
    def test_up_conv_is_nearest_then_conv(self, size):
        x, w, b = rand(2, 3, size, size, grad=True), rand(5, 3, 3, 3, grad=True), rand(5, grad=True)
        ours, naive = up_conv(x, w, b), F.conv2d(F.interpolate(x, scale_factor=2), w, b, padding=1)
        self._same(ours, naive, (x, w, b))

    @pytest.mark.parametrize("size", [2, 4, 8])
    def test_conv_down_is_conv_then_average(self, size):
        x, w, b = rand(2, 3, size, size, grad=True), rand(5, 3, 3, 3, grad=True), rand(5, grad=True)
        ours, naive = conv_down(x, w, b), F.avg_pool2d(F.conv2d(x, w, b, padding=1), 2)
        self._same(ours, naive, (x, w, b))

    @staticmethod
    def _same(ours, naive, inputs):
        torch.testing.assert_close(ours, naive, **EXACT)
        direction = torch.randn_like(naive)
        for a, b in zip(
            torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(naive, inputs, direction), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


class TestBatchNorm:
    def groups(self, images, count):
        return Groups(range(images), count, World(), torch.device("cpu"))

    def test_one_group_is_torchs_batch_norm(self):
        norm = BatchNorm(3).double()
        x = rand(6, 3, 4, 4) * 3 + 5
        expected = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=batch_norm.EPS)
        torch.testing.assert_close(norm(x, None, self.groups(6, 1)), expected, **EXACT)

    def test_groups_are_normalised_apart(self):
        norm = BatchNorm(3).double()
        x = rand(6, 3, 4, 4)
        result = norm(x, None, self.groups(6, 2))
        for first in (0, 1):
            alone = F.batch_norm(x[first::2], None, None, training=True, eps=batch_norm.EPS)
            torch.testing.assert_close(result[first::2], alone, **EXACT)

    def test_large_offsets_do_not_lose_the_variance(self):
        """Float32 sums of squares would: the mean is 10 000 times the deviation."""
        norm = BatchNorm(2)
        x = (torch.randn(8, 2, 8, 8) + 1e4).float()
        out = norm(x, None, self.groups(8, 1))
        assert (out.var(correction=0) - 1).abs() < 0.01

    def test_conditional_scale_and_shift_are_looked_up(self):
        norm = ConditionalBatchNorm(3, 5).double()
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        x, y = rand(4, 3, 2, 2), torch.tensor([4, 0, 0, 2])
        plain = F.batch_norm(x, None, None, training=True, eps=batch_norm.EPS)
        expected = plain * norm.weight[y][..., None, None] + norm.bias[y][..., None, None]
        torch.testing.assert_close(norm(x, y, self.groups(4, 1)), expected, **EXACT)

    @pytest.mark.parametrize("count", [1, 2])
    def test_gradients(self, count):
        groups = self.groups(4, count)
        x, scale, shift = rand(4, 2, 3, 3, grad=True), rand(4, 2, grad=True), rand(4, 2, grad=True)

        def forward(x, scale, shift):
            return batch_norm._GroupNorm.apply(x, scale, shift, groups.membership, World(), 1e-5)[0]

        assert gradcheck(forward, (x, scale, shift))

    def test_a_forward_leaves_running_averages_alone_and_track_moves_them(self):
        norm = BatchNorm(2)
        x = torch.randn(8, 2, 4, 4) * 2 + 3
        norm(x, None, self.groups(8, 1))
        assert torch.equal(norm.running_mean, torch.zeros(2))
        batch_norm.track(norm, World())
        torch.testing.assert_close(norm.running_mean, 0.001 * x.mean((0, 2, 3)))
        expected = 0.999 + 0.001 * x.var((0, 2, 3), correction=0)
        torch.testing.assert_close(norm.running_var, expected)


class TestAttention:
    def attention(self, channels=8):
        layer = SelfAttention(channels).double()
        torch.nn.init.constant_(layer.gamma, 0.7)
        spectral_norm.warm_up(layer)
        return layer

    def test_is_the_formula(self):
        layer, x = self.attention(16), rand(2, 16, 4, 6)
        theta = layer.theta(x).flatten(2)
        phi = F.max_pool2d(layer.phi(x), 2).flatten(2)
        g = F.max_pool2d(layer.g(x), 2).flatten(2)
        beta = torch.softmax(torch.einsum("bcq,bck->bqk", theta, phi), dim=-1)
        attended = torch.einsum("bqk,bck->bcq", beta, g).view(2, 8, 4, 6)
        torch.testing.assert_close(layer(x), x + layer.gamma * layer.out(attended), **EXACT)

    def test_rows_of_the_map_sum_to_one(self):
        layer = self.attention()
        maps = layer.maps(rand(2, 8, 4, 4))
        assert maps.shape == (2, 16, 4)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 16, dtype=torch.float64), **EXACT)

    def test_starts_as_the_identity(self):
        x = rand(1, 8, 4, 4)
        assert torch.equal(SelfAttention(8).double()(x), x)

    def test_gradients(self):
        layer = self.attention()
        assert gradcheck(layer, rand(1, 8, 4, 4, grad=True))


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, -0.5, 1.0])
    assert losses.discriminator_hinge(real, fake) == (0 + 0.5 + 2) + (0 + 0.5 + 2)
    assert losses.generator_hinge(fake) == 1.5
