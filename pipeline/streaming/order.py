"""The order of samples: a pure function that maps (shard sizes, seed, position) to a sample.

N is the number of samples of the split, L is the number of lanes, and W is the number of workers. Epoch e occupies the
positions [eN, (e + 1)N) and is a permutation of the samples:

1. The shards are permuted and concatenated into a line.
2. The line is cut into L lanes by the number of samples. Lane l holds the places [⌊lN/L⌋, ⌊(l + 1)N/L⌋) of the line.
3. The samples are permuted inside windows of a lane.
4. Position p is in row ⌊k/L⌋ with k = p − eN. A row visits the lanes 0 … L − 1. The last row may be partial. It visits
   only the longer lanes.

Position p belongs to worker p mod W. The number of workers, the batch size and failures do not change the sequence. A
worker reads few lanes, and it reads each lane nearly shard after shard.

All lanes are in the same window at the same time. An epoch is therefore a sequence of slabs of window × L positions.
Only the requested slabs are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from sagan.random import Purpose, permutation


class Order:
    """The order of the samples of one split.

    Args:
        shard_sizes: Number of samples of each shard. Sample ids count through the shards in this order.
        seed: Seed of the permutations.
        lanes: Number of lanes, L.
        window: Number of samples of a lane that are permuted together.

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
        # Room for the slabs that are being read or prefetched, across the end of an epoch.
        self._slab = lru_cache(maxsize=4)(self._interleave)
        self._line = lru_cache(maxsize=2)(self._shuffle_shards)

    def samples(self, positions: range | np.ndarray) -> np.ndarray:
        """Return the sample ids at `positions`: int64 [n], 0 … N − 1.

        Positions are ≥ 0. They may be in any order and in any epochs.
        """
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
        """Return the indices of the shards that hold the samples at `positions`: int64 [n]."""
        return np.searchsorted(self._ends, self.samples(positions), side="right")

    def fetches(self, workers: int) -> int:
        """Return how many shards `workers` workers fetch in the first epoch, summed over the workers.

        The number hardly differs in other epochs.
        """
        slab, needed = self._window * self._lanes, np.zeros((workers, len(self._sizes)), dtype=bool)
        for first in range(0, self.samples_per_epoch, slab):
            positions = np.arange(first, min(first + slab, self.samples_per_epoch))
            needed[positions % workers, self.shards(positions)] = True
        return int(needed.sum())

    def _interleave(self, epoch: int, slab: int) -> np.ndarray:
        """Return the sample ids of window number `slab` of all lanes, row by row: int64 [≤ window × L]."""
        offsets, ends = self._line(epoch)
        windows = []
        for lane in range(self._lanes):
            start = self._bounds[lane] + slab * self._window
            places = np.arange(start, min(start + self._window, self._bounds[lane + 1]))
            ids = places + offsets[np.searchsorted(ends, places, side="right")]
            windows.append(ids[permutation(len(ids), self.seed, Purpose.WINDOW_ORDER, epoch, lane, slab)])
        rows = min(map(len, windows))
        full = np.stack([window[:rows] for window in windows], axis=1).ravel()
        return np.concatenate([full, *(window[rows:] for window in windows)])

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the line of an epoch's permuted shards as (offsets, ends), both int64 [number of shards].

        `ends` holds the place in the line where each shard ends. A sample id is a place in the line plus the offset of
        its shard.
        """
        shards = permutation(len(self._sizes), self.seed, Purpose.SHARD_ORDER, epoch)
        ends = np.cumsum(self._sizes[shards])
        return self._ends[shards] - ends, ends
