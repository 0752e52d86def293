"""Batch norm over groups of a batch is torch's over each group; its gradients are found by finite differences."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from sagan import batch_norm
from sagan.batch_norm import BatchNorm, ConditionalBatchNorm, Groups
from sagan.ranks import World
from tests.unit.sagan.float64 import EXACT, rand

EPS = 1e-5


def groups_of(images, count):
    return Groups(range(images), count, World(), torch.device("cpu"))


def test_one_group_is_torchs_batch_norm():
    norm = BatchNorm(3, EPS).double()
    x = rand(6, 3, 4, 4) * 3 + 5
    expected = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=EPS)
    torch.testing.assert_close(norm(x, None, groups_of(6, 1)), expected, **EXACT)


def test_groups_are_normalised_apart():
    norm = BatchNorm(3, EPS).double()
    x = rand(6, 3, 4, 4)
    result = norm(x, None, groups_of(6, 2))
    for first in (0, 1):
        alone = F.batch_norm(x[first::2], None, None, training=True, eps=EPS)
        torch.testing.assert_close(result[first::2], alone, **EXACT)


def test_two_batches_behind_one_another_are_normalised_apart():
    norm = BatchNorm(3, EPS).double()
    x = rand(10, 3, 4, 4)
    for count in (1, 2):
        groups = Groups(range(7, 12), count, World(), torch.device("cpu"))
        expected = torch.cat([norm(x[:5], None, groups), norm(x[5:], None, groups)])
        torch.testing.assert_close(norm(x, None, groups.twice()), expected, **EXACT)


def test_large_offsets_do_not_lose_the_variance():
    """Float32 sums of squares would: the mean is 10 000 times the deviation."""
    norm = BatchNorm(2, EPS)
    x = (torch.randn(8, 2, 8, 8) + 1e4).float()
    out = norm(x, None, groups_of(8, 1))
    assert (out.var(correction=0) - 1).abs() < 0.01


def test_conditional_scale_and_shift_are_looked_up():
    norm = ConditionalBatchNorm(3, 5, EPS).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, y = rand(4, 3, 2, 2), torch.tensor([4, 0, 0, 2])
    plain = F.batch_norm(x, None, None, training=True, eps=EPS)
    expected = plain * norm.weight[y][..., None, None] + norm.bias[y][..., None, None]
    torch.testing.assert_close(norm(x, y, groups_of(4, 1)), expected, **EXACT)


def test_a_group_over_ranks_is_refused_where_not_all_ranks_take_part():
    """A sample grid by one rank must fail at once instead of waiting for the others for ever."""
    with pytest.raises(ValueError, match="a batch-norm group spans 2 ranks, so every rank must run this forward"):
        Groups(range(0, 8, 2), 1, World(0, 2), torch.device("cpu"))
    assert Groups(range(0, 8, 2), 2, World(0, 2), torch.device("cpu")).world.size == 1


@pytest.mark.parametrize("slope", [None, 0.0, 0.2])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_are_those_of_finite_differences(count, slope):
    matrices = groups_of(4, count).matrices(torch.float64)
    x, scale, shift = rand(4, 2, 3, 3, grad=True), rand(4, 2, grad=True), rand(4, 2, grad=True)

    def forward(x, scale, shift):
        return batch_norm._GroupNorm.apply(x, scale, shift, matrices, World(), 1e-5, slope)[0]

    assert gradcheck(forward, (x, scale, shift))


def test_a_forward_leaves_running_averages_alone_and_track_moves_them():
    norm = BatchNorm(2, EPS)
    x = torch.randn(8, 2, 4, 4) * 2 + 3
    norm(x, None, groups_of(8, 1))
    assert torch.equal(norm.running_mean, torch.zeros(2))
    batch_norm.track(norm, batch_norm.used(norm), World())
    torch.testing.assert_close(norm.running_mean, 0.001 * x.mean((0, 2, 3)))
    expected = 0.999 + 0.001 * x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm.running_var, expected)
