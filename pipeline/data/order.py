"""Which sample stands at which position: a pure function of (shard sizes, seed, position).

Epoch e occupies positions [eN, (e + 1)N) and is a permutation. Its permuted shards, concatenated, are cut by samples
into L lanes [⌊lN/L⌋, ⌊(l+1)N/L⌋), and samples are permuted inside windows of a lane. With k = p − eN, row ⌊k/L⌋ visits
lanes 0 … L−1; the last, partial row visits the longer lanes only. The worker of position p is p mod W: neither the
number of workers nor batches nor failures change the sequence, and a worker reads few lanes, each nearly shard after
shard.

All lanes are in the same window at a time, so an epoch is a sequence of slabs of window × L positions, and only the
slabs that are asked for are ever computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

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
        self._ends = np.cumsum(self._sizes)
        self.samples_per_epoch = int(self._sizes.sum())
        if self.samples_per_epoch == 0:
            raise ValueError("there are no samples to order")
        self.seed, self._lanes, self._window = seed, lanes, window
        self._bounds = np.arange(lanes + 1) * self.samples_per_epoch // lanes
        self._slab = lru_cache(maxsize=4)(self._interleave)  # what is read, what is fetched ahead, the next epoch's
        self._line = lru_cache(maxsize=2)(self._shuffle_shards)

    def samples(self, positions: range | np.ndarray) -> np.ndarray:
        """int64 [n]: the sample ids, 0 … N−1, at `positions` (any, of any epochs, all ≥ 0)."""
        if isinstance(positions, range):
            positions = np.arange(positions.start, positions.stop, positions.step)
        epochs, k = np.divmod(positions, self.samples_per_epoch)
        slabs, places = np.divmod(k, self._window * self._lanes)
        ids = np.empty_like(positions)
        for epoch, slab in set(zip(epochs.tolist(), slabs.tolist(), strict=True)):
            here = (epochs == epoch) & (slabs == slab)
            ids[here] = self._slab(epoch, slab)[places[here]]
        return ids

    def shards(self, positions: range | np.ndarray) -> np.ndarray:
        """int64 [n]: the shards that hold the samples at `positions`."""
        return np.searchsorted(self._ends, self.samples(positions), side="right")

    def fetches(self, workers: int) -> int:
        """Shards that `workers` fetch in an epoch, summed over them: the first epoch's, and hardly another's."""
        slab, needed = self._window * self._lanes, np.zeros((workers, len(self._sizes)), dtype=bool)
        for first in range(0, self.samples_per_epoch, slab):
            positions = np.arange(first, min(first + slab, self.samples_per_epoch))
            needed[positions % workers, self.shards(positions)] = True
        return int(needed.sum())

    def _interleave(self, epoch: int, slab: int) -> np.ndarray:
        """int64 [≤ window × L]: the ids of window number `slab` of all lanes, row by row."""
        to_ids, ends = self._line(epoch)
        windows = []
        for lane in range(self._lanes):
            start = self._bounds[lane] + slab * self._window
            places = np.arange(start, min(start + self._window, self._bounds[lane + 1]))
            ids = places + to_ids[np.searchsorted(ends, places, side="right")]
            windows.append(ids[permutation(len(ids), self.seed, WINDOW, epoch, lane, slab)])
        rows = min(map(len, windows))
        full = np.stack([window[:rows] for window in windows], axis=1).ravel()
        return np.concatenate([full, *(window[rows:] for window in windows)])

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in a line: of each, what leads from a place in it to a sample id, and where it ends."""
        shards = permutation(len(self._sizes), self.seed, SHARDS, epoch)
        ends = np.cumsum(self._sizes[shards])
        return self._ends[shards] - ends, ends


def permutation(n: int, seed: int, purpose: int, *where: int) -> np.ndarray:
    """int64 [n]: a permutation, by sorting raw Philox words keyed (seed, purpose; where), `where` up to three integers.

    NumPy guarantees bit streams, but not `Generator.permutation`.
    """
    counter = np.zeros(4, dtype=np.uint64)  # word 0 counts on from here
    counter[1 : 1 + len(where)] = where
    bits = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=counter)
    return np.argsort(bits.random_raw(n), kind="stable")
