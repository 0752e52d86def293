"""Random numbers of a run: latents, labels, flips, uniform numbers, bytes and permutations.

Seed, purpose and position determine a number, and the result is the same on every machine. Row p of a stream is a fixed
block of Philox counters. So any rows can be drawn without the rows before them, and no draw depends on the number of
workers, on the batch or on earlier draws. NumPy guarantees the raw bit stream.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

_WORDS_PER_COUNTER = 4  # Philox4x64 yields four 64-bit words per counter value


class Purpose(IntEnum):
    """Purpose of a stream. The values are part of the format of a run: never reuse a value."""

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
    AUGMENT_REAL = 11
    AUGMENT_D = 12
    AUGMENT_G = 13
    DROP_REAL = 14
    DROP_D = 15
    DROP_G = 16
    SHARD_ORDER = 101
    WINDOW_ORDER = 102
    PACKING = 103


def _words(seed: int, purpose: Purpose, positions: range, width: int) -> np.ndarray:
    """Return the raw words of the rows at `positions`, uint64 [len(positions), width].

    `seed` and the positions must be non-negative.
    """
    if len(positions) == 0:
        return np.empty((0, width), dtype=np.uint64)
    counters_per_row = -(-width // _WORDS_PER_COUNTER)
    first, last = positions[0], positions[-1]
    bits = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64))
    bits.advance(first * counters_per_row)
    rows = bits.random_raw((last - first + 1) * counters_per_row * _WORDS_PER_COUNTER)
    return rows.reshape(last - first + 1, -1)[:: positions.step, :width]


def _uniform(words: np.ndarray) -> np.ndarray:
    """Convert raw words to float64 with 53 bits, in (0, 1)."""
    values = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.minimum(values, 1 - 2.0**-53)  # the largest word rounds to 1


def draw_latents(seed: int, purpose: Purpose, positions: range, z_dim: int) -> torch.Tensor:
    """Return latents from N(0, 1), float32 [len(positions), z_dim].

    The normal numbers come from Box–Muller in float64 on the host.
    """
    pairs = -(-z_dim // 2)
    u = _uniform(_words(seed, purpose, positions, 2 * pairs))
    radius, angle = np.sqrt(-2.0 * np.log(u[:, :pairs])), 2.0 * np.pi * u[:, pairs:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return torch.from_numpy(normal[:, :z_dim].astype(np.float32))


def draw_labels(seed: int, purpose: Purpose, positions: range, num_classes: int) -> torch.Tensor:
    """Return labels, int64 [len(positions)], uniform over 0 … num_classes − 1."""
    u = _uniform(_words(seed, purpose, positions, 1)[:, 0])
    return torch.from_numpy((u * num_classes).astype(np.int64))


def draw_flips(seed: int, positions: range) -> torch.Tensor:
    """Return which images to mirror, bool [len(positions)]. Each value is true with probability one half."""
    return torch.from_numpy(_uniform(_words(seed, Purpose.FLIP, positions, 1)[:, 0]) < 0.5)


def draw_uniform(seed: int, purpose: Purpose, positions: range, width: int) -> torch.Tensor:
    """Return uniform numbers in (0, 1), float64 [len(positions), width]."""
    return torch.from_numpy(_uniform(_words(seed, purpose, positions, width)))


def draw_bytes(seed: int, purpose: Purpose, positions: range, width: int) -> torch.Tensor:
    """Return random bytes, uint8 [len(positions), width]. All values are equally likely."""
    words = _words(seed, purpose, positions, -(-width // 8)).astype("<u8")  # the same bytes on every machine
    return torch.from_numpy(words.view(np.uint8)[:, :width].copy())


def permutation(n: int, seed: int, purpose: Purpose, *where: int) -> np.ndarray:
    """Return a permutation of 0 … n − 1, int64 [n].

    The function sorts raw Philox words. Their key is (seed, purpose), and `where` is the start of their counter: up to
    three integers. NumPy guarantees bit streams, but not the result of `Generator.permutation`.
    """
    counter = np.zeros(4, dtype=np.uint64)  # Philox counts up in word 0
    counter[1 : 1 + len(where)] = where
    bits = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=counter)
    return np.argsort(bits.random_raw(n), kind="stable")
