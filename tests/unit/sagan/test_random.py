"""Latents, labels and flips depend on seed, purpose and position, and on nothing else."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sagan.random import Purpose, draw_flips, draw_labels, draw_latents, permutation
from sagan.ranks import World


@given(
    start=st.integers(0, 10**10),
    images=st.integers(1, 40),
    size=st.integers(1, 8),
    z_dim=st.integers(1, 9),
    seed=st.integers(0, 2**63),
)
def test_ranks_together_draw_what_one_process_draws(start, images, size, z_dim, seed):
    whole = draw_latents(seed, Purpose.Z_D, range(start, start + images), z_dim)
    for rank in range(size):
        share = World(rank, size).share(start, start + images)
        mine = draw_latents(seed, Purpose.Z_D, share, z_dim)
        assert torch.equal(mine, whole[[p - start for p in share]])


def test_purposes_and_seeds_are_different_streams():
    rows = range(64)
    assert not torch.equal(draw_latents(0, Purpose.Z_D, rows, 8), draw_latents(0, Purpose.Z_G, rows, 8))
    assert not torch.equal(draw_latents(0, Purpose.Z_D, rows, 8), draw_latents(1, Purpose.Z_D, rows, 8))


def test_distributions():
    """5 standard errors of 100 000 draws; the streams are fixed, so this cannot flicker."""
    z = draw_latents(3, Purpose.SAMPLE_Z, range(25_000), 4).double()
    assert abs(z.mean()) < 5 / 100_000**0.5
    assert abs(z.var() - 1) < 5 * (2 / 100_000) ** 0.5
    y = draw_labels(3, Purpose.SAMPLE_Y, range(100_000), 10)
    assert (y.bincount(minlength=10) - 10_000).abs().max() < 5 * (100_000 * 0.1 * 0.9) ** 0.5
    assert abs(draw_flips(3, range(100_000)).double().mean() - 0.5) < 5 * 0.5 / 100_000**0.5


@given(n=st.integers(0, 100), seed=st.integers(0, 2**63), where=st.lists(st.integers(0, 2**63), max_size=3))
def test_a_permutation_holds_every_number_once(n, seed, where):
    assert sorted(permutation(n, seed, Purpose.PACKING, *where)) == list(range(n))


def test_the_streams_are_those_of_every_earlier_version():
    """Part of the format of a run: a changed value would make resumed runs differ."""
    row = draw_latents(7, Purpose.Z_G, range(5, 6), 3)
    assert [f"{v:.6f}" for v in row[0].tolist()] == ["0.505825", "0.620278", "0.183375"]
    assert draw_labels(7, Purpose.Y_D, range(100, 106), 1000).tolist() == [783, 356, 559, 632, 355, 684]
    assert permutation(8, 7, Purpose.SHARD_ORDER, 3).tolist() == [7, 4, 1, 5, 2, 3, 6, 0]
    assert permutation(8, 7, Purpose.WINDOW_ORDER, 3, 1, 2).tolist() == [1, 4, 0, 6, 7, 5, 3, 2]
    assert permutation(8, 7, Purpose.PACKING, 1).tolist() == [5, 1, 0, 3, 7, 2, 6, 4]


def test_no_word_gives_a_label_outside_the_classes(monkeypatch):
    """The largest word is drawn once in 2^53 times, so it is put in place of the stream."""
    largest = np.full((3, 1), np.iinfo(np.uint64).max, dtype=np.uint64)
    monkeypatch.setattr("sagan.random._words", lambda *_: largest)
    assert draw_labels(0, Purpose.Z_D, range(3), 7).tolist() == [6, 6, 6]
