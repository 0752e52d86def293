"""Which sample stands at which position: a pure function of (shard sizes, seed, position).

Epoch e occupies positions [eN, (e + 1)N) and is a permutation. Its permuted shards, concatenated, are cut by samples
into L lanes [⌊lN/L⌋, ⌊(l+1)N/L⌋), and samples are permuted inside windows of a lane. With k = p − eN, row ⌊k/L⌋ visits
lanes 0 … L−1; the last, partial row visits the longer lanes only. The worker of position p is p mod W: neither the
number of workers nor batches nor failures change the sequence, and a worker reads few lanes, each nearly shard after
shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

# What a permutation is for: second word of the Philox key, distinct from the purposes of `sagan.random`. They are part
# of the format of a run, and of packed collections.
SHARDS, WINDOW, PACKING = 101, 102, 103


class Order:
    """The order of one split.

    `shard_sizes`: samples of each shard; ids count through the shards in this order. `lanes` and `window` as above.
    Raises ValueError where there are no samples.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, lanes: int, window: int) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.samples_per_epoch = int(self._sizes.sum())
        if self.samples_per_epoch == 0:
            raise ValueError("there are no samples to order")
        self.seed, self._lanes, self._window = seed, lanes, window
        self._epoch = lru_cache(maxsize=2)(self._arrange)  # a batch may span two epochs

    def samples(self, positions: range | np.ndarray) -> np.ndarray:
        """int64 [n]: the sample ids, 0 … N−1, at `positions` (any, of any epochs, all ≥ 0)."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, k = np.divmod(positions, self.samples_per_epoch)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._epoch(int(epoch))[k[here]]
        return ids

    def _arrange(self, epoch: int) -> np.ndarray:
        """int64 [N]: the sample ids of one epoch in the order in which they are visited."""
        line = self._shuffled_shards(epoch)
        total, lanes = len(line), self._lanes
        bounds = np.arange(lanes + 1) * total // lanes
        for lane, (start, stop) in enumerate(pairwise(bounds)):
            for window, first in enumerate(range(start, stop, self._window)):
                part = line[first : min(first + self._window, stop)]
                part[:] = part[permutation(len(part), self.seed, WINDOW, epoch, lane, window)]
        rows = total // lanes
        full = line[bounds[:-1] + np.arange(rows)[:, None]].ravel()
        longer = np.diff(bounds) > rows
        return np.concatenate([full, line[bounds[1:][longer] - 1]])

    def _shuffled_shards(self, epoch: int) -> np.ndarray:
        """int64 [N]: the ids of all shards, one shard after the other, shards permuted."""
        shards = permutation(len(self._sizes), self.seed, SHARDS, epoch)
        first_ids, sizes = (np.cumsum(self._sizes) - self._sizes)[shards], self._sizes[shards]
        first_places = np.cumsum(sizes) - sizes
        return np.repeat(first_ids - first_places, sizes) + np.arange(self.samples_per_epoch)


def permutation(n: int, seed: int, purpose: int, *where: int) -> np.ndarray:
    """int64 [n]: a permutation, by sorting raw Philox words keyed (seed, purpose; where), `where` up to three integers.

    NumPy guarantees bit streams, but not `Generator.permutation`.
    """
    counter = np.zeros(4, dtype=np.uint64)  # word 0 counts on from here
    counter[1 : 1 + len(where)] = where
    bits = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=counter)
    return np.argsort(bits.random_raw(n), kind="stable")
