"""The order's promises, for any collection, seed, lanes, window and world."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.streaming.order import Order
from sagan.ranks import World

thorough = settings(max_examples=50)

shard_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)
orders = st.builds(
    Order,
    shard_sizes,
    seed=st.integers(0, 2**63),
    lanes=st.integers(1, 20),
    window=st.integers(1, 50),
)


@thorough
@given(orders, st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(order: Order, epoch: int) -> None:
    n = order.samples_per_epoch
    ids = order.samples(range(epoch * n, (epoch + 1) * n))
    assert sorted(ids) == list(range(n))


@thorough
@given(orders, st.data())
def test_any_slice_equals_the_uninterrupted_sequence(order: Order, data: st.DataObject) -> None:
    n = order.samples_per_epoch
    sequence = order.samples(range(3 * n))
    for start in {0, 1, n - 1, n, n + 1, data.draw(st.integers(0, 2 * n), label="start")}:
        stop = min(start + data.draw(st.integers(0, 2 * n), label="length"), 3 * n)
        np.testing.assert_array_equal(order.samples(range(start, stop)), sequence[start:stop])


@thorough
@given(orders, st.data())
def test_positions_may_come_in_any_order_and_more_than_once(order: Order, data: st.DataObject) -> None:
    n = order.samples_per_epoch
    positions = np.array(data.draw(st.lists(st.integers(0, 4 * n - 1), max_size=30)), dtype=np.int64)
    np.testing.assert_array_equal(order.samples(positions), order.samples(range(4 * n))[positions])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@thorough
@given(orders, st.integers(1, 100), st.integers(0, 500))
def test_the_workers_of_any_world_read_the_same_global_batches(size: int, order: Order, batch: int, start: int) -> None:
    expected = order.samples(range(start, start + batch))
    gathered = np.full(batch, -1)
    for rank in range(size):
        positions = World(rank, size).share(start, start + batch)
        gathered[np.asarray(positions, dtype=np.int64) - start] = order.samples(positions)
    np.testing.assert_array_equal(gathered, expected)


@thorough
@given(shard_sizes, st.integers(0, 2**63), st.integers(1, 20), st.integers(1, 50))
def test_rows_visit_every_lane_once_and_the_last_one_the_longer_lanes(
    sizes: list[int], seed: int, lanes: int, window: int
) -> None:
    """Derived from the definition alone: where the seams are, not how they were made."""
    order = Order(sizes, seed, lanes, window)
    n = order.samples_per_epoch
    line = shards_in_order_of_visit(order, sizes, lanes)
    bounds = [lane * n // lanes for lane in range(lanes + 1)]
    ids = order.samples(range(n)).tolist()
    long = [lane for lane in range(lanes) if bounds[lane + 1] - bounds[lane] > n // lanes]
    for lane in range(lanes):
        visited = ids[lane : lanes * (n // lanes) : lanes]
        if lane in long:
            visited.append(ids[lanes * (n // lanes) + long.index(lane)])
        for first in range(0, len(visited), window):
            expected = line[bounds[lane] + first : min(bounds[lane] + first + window, bounds[lane + 1])]
            assert sorted(visited[first : first + window]) == sorted(expected)


def shards_in_order_of_visit(order: Order, sizes: list[int], lanes: int) -> list[int]:
    """The line of permuted shards, found with lanes and windows of one (which permute nothing)."""
    plain = Order(sizes, order.seed, lanes=1, window=1)
    return plain.samples(range(plain.samples_per_epoch)).tolist()


@thorough
@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_seeds_and_epochs_differ(seed: int, other: int) -> None:
    sizes = [50] * 4
    first, second = Order(sizes, seed, 4, 20), Order(sizes, other, 4, 20)
    assert (first.samples(range(200)) != first.samples(range(200, 400))).any()
    assert seed == other or (first.samples(range(200)) != second.samples(range(200))).any()


@thorough
@given(shard_sizes, st.integers(0, 2**63), st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 50))
def test_the_workers_together_fetch_hardly_more_than_the_set(
    sizes: list[int], seed: int, multiple: int, workers: int, window: int
) -> None:
    """Where the world divides the lanes, a shard has two workers only at a seam of lanes and in the last row."""
    lanes = multiple * workers
    order = Order(sizes, seed, lanes, window)
    for epoch in (0, 3):
        assert len(sizes) <= fetches(order, sizes, epoch, workers) <= len(sizes) + 2 * lanes


@thorough
@given(shard_sizes, st.integers(0, 2**63), st.integers(1, 20), st.integers(1, 12), st.integers(1, 50))
def test_fetches_are_counted_for_any_world(sizes: list[int], seed: int, lanes: int, workers: int, window: int) -> None:
    order = Order(sizes, seed, lanes, window)
    assert order.fetches(workers) == fetches(order, sizes, 0, workers)


def fetches(order: Order, sizes: list[int], epoch: int, workers: int) -> int:
    """Pairs of a worker and a shard that it reads from in an epoch, found sample by sample."""
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    epoch_positions = range(epoch * order.samples_per_epoch, (epoch + 1) * order.samples_per_epoch)
    shares = (World(rank, workers).share(epoch_positions.start, epoch_positions.stop) for rank in range(workers))
    return sum(len(np.unique(shard_of[order.samples(share)])) for share in shares)


@pytest.mark.parametrize(("lanes", "workers"), [(4, 1), (4, 4), (16, 8), (16, 16)])
def test_forty_shards_a_lane_keep_the_fetches_below_a_tenth_more_than_the_set(lanes: int, workers: int) -> None:
    shards = 40 * lanes
    assert Order([50] * shards, seed=5, lanes=lanes, window=100).fetches(workers) <= 1.1 * shards


@thorough
@given(shard_sizes, st.data())
def test_shards_are_those_of_the_samples(sizes: list[int], data: st.DataObject) -> None:
    order = Order(sizes, seed=1, lanes=3, window=4)
    start = data.draw(st.integers(0, 3 * order.samples_per_epoch), label="start")
    positions = range(start, start + 20)
    expected = np.repeat(np.arange(len(sizes)), sizes)[order.samples(positions)]
    np.testing.assert_array_equal(order.shards(positions), expected)


def test_a_lane_reads_nearly_shard_after_shard() -> None:
    per_shard, lanes, window = 50, 4, 100
    order = Order([per_shard] * 40, seed=5, lanes=lanes, window=window)
    lane = order.samples(range(0, 2000, lanes)) // per_shard
    for first in range(0, len(lane), window):
        assert len(np.unique(lane[first : first + window])) <= window // per_shard + 1


def test_the_order_of_a_run_never_changes() -> None:
    """These numbers are part of the format: a run resumed by a later version must continue the same sequence."""
    first = [3, 7, 11, 4, 8, 0, 5, 9, 2, 6, 10, 1]
    second = [1, 5, 9, 0, 4, 8, 2, 7, 10, 3, 6, 11]
    assert Order([3, 5, 4], seed=7, lanes=3, window=2).samples(range(24)).tolist() == first + second


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Order([], seed=0, lanes=1, window=1)
