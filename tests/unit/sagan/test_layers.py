"""Custom layers equal their formulas: values in float64 to rounding, gradients by finite differences."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from sagan import batch_norm, losses, spectral_norm
from sagan.attention import SelfAttention
from sagan.batch_norm import BatchNorm, ConditionalBatchNorm, Groups
from sagan.resample import conv_down, double, halve, up_conv
from sagan.spectral_norm import Spectral
from sagan.world import World

EPS = 1e-5
EXACT = {"rtol": 0, "atol": 1e-12}  # float64 against float64 in another order of operations


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def rand(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


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


class TestSpectralNorm:
    @pytest.mark.parametrize("layer", every_layer())
    def test_sigma_converges_to_the_largest_singular_value(self, layer):
        layer.double()
        torch.nn.init.normal_(layer.weight)  # random weights: orthogonal ones hide every mistake
        spectral_norm.warm_up(layer, 500)
        largest = torch.linalg.svdvals(layer.matrix)[0]
        assert abs(layer.sigma / largest - 1) < 0.01
        assert (layer.normalised_weight * layer.sigma - layer.weight).abs().max() < 1e-12

    def test_sigma_of_an_upsampling_convolution_is_that_of_its_plain_form(self):
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
    def test_weights_lie_in_memory_as_they_are_indexed(self, size):
        """On sides of length 1 too, or DDP's buckets have other strides than the gradients, which it copies then."""
        weight = spectral_norm.Conv2d(6, 4, size, CONVERGED).weight
        assert weight.stride() == torch.empty(weight.shape).stride()

    def test_a_forward_changes_nothing_and_an_advance_does(self):
        layer = spectral_norm.Conv2d(3, 4, 3, CONVERGED)
        spectral_norm.warm_up(layer, 1)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.train()(torch.randn(2, 3, 5, 5))
        assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
        spectral_norm.advance(layer, World())
        assert not torch.equal(before["u"], layer.u)

    @pytest.mark.parametrize("layer", every_layer())
    def test_gradients_flow_through_sigma_with_u_and_v_constant(self, layer):
        layer.double()
        spectral_norm.warm_up(layer, 3)
        self._same_gradient(layer, lambda matrix: torch.dot(layer.u, matrix @ layer.v))

    @pytest.mark.parametrize("layer", every_layer(THROUGH))
    def test_gradients_flow_through_the_iteration_where_asked(self, layer):
        """The official code's: σ of one power iteration from the vector before, differentiated as a whole."""
        layer.double()
        spectral_norm.warm_up(layer, 2)  # far from convergence, where the two gradients differ
        before = layer.u_before

        def sigma(matrix):
            v = F.normalize(matrix.t() @ before, dim=0)
            u = F.normalize(matrix @ v, dim=0)
            return torch.dot(u, matrix @ v)

        self._same_gradient(layer, sigma)
        constant = torch.outer(layer.u, layer.v)
        matrix = layer.matrix.clone().requires_grad_()
        (through,) = torch.autograd.grad(sigma(matrix), matrix)
        assert (through - constant).norm() / constant.norm() > 0.01

    @staticmethod
    def _same_gradient(layer, sigma):
        direction = torch.randn_like(layer.weight)
        (ours,) = torch.autograd.grad((layer.normalised_weight * direction).sum(), layer.weight)
        weight = layer.weight.detach().requires_grad_()
        matrix = weight.flatten(0, -2).t() if layer.transposed else weight.flatten(1)
        (theirs,) = torch.autograd.grad((weight / sigma(matrix) * direction).sum(), weight)
        torch.testing.assert_close(ours, theirs, **EXACT)

    def test_gradcheck(self):
        """σ moves with W under finite differences, as the backward pass says it does."""
        u, v = F.normalize(rand(3), dim=0), F.normalize(rand(5), dim=0)

        def normalised(weight):
            return spectral_norm._DivideBySigma.apply(weight, torch.dot(u, weight.detach() @ v), weight.dtype, u, v)

        assert gradcheck(normalised, rand(3, 5, grad=True))

    @pytest.mark.parametrize("layer", every_layer())
    def test_folding_gives_the_same_function_without_norm(self, layer):
        spectral_norm.warm_up(layer, 3)
        folded = spectral_norm.fold(layer)
        assert set(folded) == {name for name, _ in layer.named_parameters()}
        assert torch.equal(folded["weight"], layer.normalised_weight)

    def test_bfloat16_touches_the_kernel_but_not_sigma(self):
        layer = spectral_norm.Conv2d(3, 4, 3, CONVERGED)
        spectral_norm.warm_up(layer)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.kernel.dtype == torch.bfloat16
            exact = layer.weight / layer.sigma
        assert torch.equal(layer.kernel.permute(0, 2, 3, 1), exact)
        assert layer.sigma.dtype == torch.float32


class TestResampling:
    @pytest.mark.parametrize("size", [2, 4, 7])
    def test_up_conv_is_nearest_then_conv(self, size):
        x, w, b = rand(2, 3, size, size, grad=True), rand(5, 3, 3, 3, grad=True), rand(5, grad=True)
        ours = up_conv(x, w.flip(2, 3).transpose(0, 1), b)
        naive = F.conv2d(F.interpolate(x, scale_factor=2), w, b, padding=1)
        self._same(ours, naive, (x, w, b))

    @pytest.mark.parametrize("size", [2, 4, 8])
    def test_conv_down_is_conv_then_average(self, size):
        x, w, b = rand(2, 3, size, size, grad=True), rand(5, 3, 3, 3, grad=True), rand(5, grad=True)
        ours, naive = conv_down(x, w, b), F.avg_pool2d(F.conv2d(x, w, b, padding=1), 2)
        self._same(ours, naive, (x, w, b))

    @pytest.mark.parametrize("resample", [double, halve])
    def test_gradients_of_the_filters(self, resample):
        assert gradcheck(resample, rand(2, 3, 4, 6, grad=True))

    def test_gradients_of_the_folded_convolutions(self):
        x, w, b = rand(1, 2, 4, 4, grad=True), rand(2, 2, 3, 3, grad=True), rand(2, grad=True)
        assert gradcheck(up_conv, (x, w, b))
        assert gradcheck(conv_down, (x, w, b))

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
        norm = BatchNorm(3, EPS).double()
        x = rand(6, 3, 4, 4) * 3 + 5
        expected = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=EPS)
        torch.testing.assert_close(norm(x, None, self.groups(6, 1)), expected, **EXACT)

    def test_groups_are_normalised_apart(self):
        norm = BatchNorm(3, EPS).double()
        x = rand(6, 3, 4, 4)
        result = norm(x, None, self.groups(6, 2))
        for first in (0, 1):
            alone = F.batch_norm(x[first::2], None, None, training=True, eps=EPS)
            torch.testing.assert_close(result[first::2], alone, **EXACT)

    def test_large_offsets_do_not_lose_the_variance(self):
        """Float32 sums of squares would: the mean is 10 000 times the deviation."""
        norm = BatchNorm(2, EPS)
        x = (torch.randn(8, 2, 8, 8) + 1e4).float()
        out = norm(x, None, self.groups(8, 1))
        assert (out.var(correction=0) - 1).abs() < 0.01

    def test_conditional_scale_and_shift_are_looked_up(self):
        norm = ConditionalBatchNorm(3, 5, EPS).double()
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        x, y = rand(4, 3, 2, 2), torch.tensor([4, 0, 0, 2])
        plain = F.batch_norm(x, None, None, training=True, eps=EPS)
        expected = plain * norm.weight[y][..., None, None] + norm.bias[y][..., None, None]
        torch.testing.assert_close(norm(x, y, self.groups(4, 1)), expected, **EXACT)

    def test_a_group_over_ranks_is_refused_where_not_all_ranks_take_part(self):
        """A sample grid by one rank must fail at once instead of waiting for the others for ever."""
        with pytest.raises(ValueError, match="a batch-norm group spans 2 ranks, so every rank must run this forward"):
            Groups(range(0, 8, 2), 1, World(0, 2), torch.device("cpu"))
        assert Groups(range(0, 8, 2), 2, World(0, 2), torch.device("cpu")).world.size == 1

    @pytest.mark.parametrize("count", [1, 2])
    def test_gradients(self, count):
        groups = self.groups(4, count)
        x, scale, shift = rand(4, 2, 3, 3, grad=True), rand(4, 2, grad=True), rand(4, 2, grad=True)

        def forward(x, scale, shift):
            return batch_norm._GroupNorm.apply(x, scale, shift, groups.membership, World(), 1e-5)[0]

        assert gradcheck(forward, (x, scale, shift))

    def test_a_forward_leaves_running_averages_alone_and_track_moves_them(self):
        norm = BatchNorm(2, EPS)
        x = torch.randn(8, 2, 4, 4) * 2 + 3
        norm(x, None, self.groups(8, 1))
        assert torch.equal(norm.running_mean, torch.zeros(2))
        batch_norm.track(norm, batch_norm.used(norm), World())
        torch.testing.assert_close(norm.running_mean, 0.001 * x.mean((0, 2, 3)))
        expected = 0.999 + 0.001 * x.var((0, 2, 3), correction=0)
        torch.testing.assert_close(norm.running_var, expected)


class TestAttention:
    def attention(self, channels=8, form="released"):
        layer = SelfAttention(channels, CONVERGED, form).double()
        torch.nn.init.constant_(layer.gamma, 0.7)
        spectral_norm.warm_up(layer)
        return layer

    def parts(self, layer, x, form):
        """(θ, φ, g) [b, positions, channels], pooled as the form says, with plain matrix products."""
        pool = (lambda h: F.max_pool2d(h, 2)) if form == "released" else lambda h: h
        theta, phi, g = (F.conv2d(x, part.kernel) for part in (layer.theta, layer.phi, layer.g))
        return [h.flatten(2).transpose(1, 2) for h in (theta, pool(phi), pool(g))]

    @pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=["even", "odd"])
    @pytest.mark.parametrize("form", ["released", "icml", "first"])
    def test_is_the_formula_and_scaled_dot_product_attention_unscaled(self, form, size):
        layer, x = self.attention(16, form), rand(2, 16, *size, grad=True)
        theta, phi, g = self.parts(layer, x, form)
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
    def test_rows_of_the_map_sum_to_one(self, form, keys):
        maps = self.attention(form=form).maps(rand(2, 8, 4, 4))
        assert maps.shape == (2, 16, keys)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 16, dtype=torch.float64), **EXACT)

    def test_starts_as_the_identity(self):
        x = rand(1, 8, 4, 4)
        assert torch.equal(SelfAttention(8, CONVERGED).double()(x), x)

    @pytest.mark.parametrize("form", ["released", "icml", "first"])
    def test_gradients(self, form):
        assert gradcheck(self.attention(form=form), rand(1, 8, 4, 4, grad=True))


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, -0.5, 1.0])
    assert losses.discriminator_hinge(real, fake) == (0 + 0.5 + 2) + (0 + 0.5 + 2)
    assert losses.generator_hinge(fake) == 1.5
