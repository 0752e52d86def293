"""Latents, labels and flips depend on seed, purpose and position, and on nothing else."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sagan.random import Purpose, flips, labels, latents
from sagan.world import World


@given(
    start=st.integers(0, 10**10),
    images=st.integers(1, 40),
    size=st.integers(1, 8),
    z_dim=st.integers(1, 9),
    seed=st.integers(0, 2**63),
)
def test_ranks_together_draw_what_one_process_draws(start, images, size, z_dim, seed):
    whole = latents(seed, Purpose.Z_D, range(start, start + images), z_dim)
    for rank in range(size):
        share = World(rank, size).share(start, start + images)
        mine = latents(seed, Purpose.Z_D, share, z_dim)
        assert torch.equal(mine, whole[[p - start for p in share]])


def test_purposes_and_seeds_are_different_streams():
    rows = range(64)
    assert not torch.equal(latents(0, Purpose.Z_D, rows, 8), latents(0, Purpose.Z_G, rows, 8))
    assert not torch.equal(latents(0, Purpose.Z_D, rows, 8), latents(1, Purpose.Z_D, rows, 8))


def test_distributions():
    """5 standard errors of 100 000 draws; the streams are fixed, so this cannot flicker."""
    z = latents(3, Purpose.SAMPLE_Z, range(25_000), 4).double()
    assert abs(z.mean()) < 5 / 100_000**0.5
    assert abs(z.var() - 1) < 5 * (2 / 100_000) ** 0.5
    y = labels(3, Purpose.SAMPLE_Y, range(100_000), 10)
    assert (y.bincount(minlength=10) - 10_000).abs().max() < 5 * (100_000 * 0.1 * 0.9) ** 0.5
    assert abs(flips(3, range(100_000)).double().mean() - 0.5) < 5 * 0.5 / 100_000**0.5


def test_the_streams_are_those_of_every_earlier_version():
    """Part of the format of a run: a changed value would make resumed runs differ."""
    row = latents(7, Purpose.Z_G, range(5, 6), 3)
    assert [f"{v:.6f}" for v in row[0].tolist()] == ["0.505825", "0.620278", "0.183375"]
    assert labels(7, Purpose.Y_D, range(100, 106), 1000).tolist() == [783, 356, 559, 632, 355, 684]
