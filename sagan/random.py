"""Everything random that belongs to a sample: (seed, purpose, position) → the same numbers on every machine.

Row p of a stream is a fixed block of Philox counters, so any rows can be drawn without the ones before them and no
draw depends on the number of workers, the batch or what happened earlier. NumPy guarantees the raw bit stream.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

_WORDS_PER_COUNTER = 4  # Philox4x64 yields four 64-bit words per counter value


class Purpose(IntEnum):
    """What a stream is for. The numbers are part of the format of a run: never reuse one."""

    FLIP = 1
    Z_D = 2
    Y_D = 3
    Z_G = 4
    Y_G = 5
    DEQUANTISE = 6
    SAMPLE_Z = 7
    SAMPLE_Y = 8
    STANDING_Z = 9
    STANDING_Y = 10


def _words(seed: int, purpose: Purpose, positions: range, width: int) -> np.ndarray:
    """uint64 [len(positions), width]: the raw words of those rows. `seed` and positions are non-negative."""
    if len(positions) == 0:
        return np.empty((0, width), dtype=np.uint64)
    counters_per_row = -(-width // _WORDS_PER_COUNTER)
    first, last = positions[0], positions[-1]
    bits = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64))
    bits.advance(first * counters_per_row)
    rows = bits.random_raw((last - first + 1) * counters_per_row * _WORDS_PER_COUNTER)
    return rows.reshape(last - first + 1, -1)[:: positions.step, :width]


def _uniform(words: np.ndarray) -> np.ndarray:
    """float64 in (0, 1), 53 bits, never 0."""
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def latents(seed: int, purpose: Purpose, positions: range, z_dim: int) -> torch.Tensor:
    """float32 [len(positions), z_dim] of N(0, 1), by Box-Muller in float64 on the host."""
    pairs = -(-z_dim // 2)
    u = _uniform(_words(seed, purpose, positions, 2 * pairs))
    radius, angle = np.sqrt(-2.0 * np.log(u[:, :pairs])), 2.0 * np.pi * u[:, pairs:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return torch.from_numpy(normal[:, :z_dim].astype(np.float32))


def labels(seed: int, purpose: Purpose, positions: range, classes: int) -> torch.Tensor:
    """int64 [len(positions)], uniform over 0 … classes − 1."""
    u = _uniform(_words(seed, purpose, positions, 1)[:, 0])
    return torch.from_numpy((u * classes).astype(np.int64))


def flips(seed: int, positions: range) -> torch.Tensor:
    """bool [len(positions)], true with probability one half: the images to mirror."""
    return torch.from_numpy(_uniform(_words(seed, Purpose.FLIP, positions, 1)[:, 0]) < 0.5)
