"""Which ranks are silent, and which hold the others up."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.training.status.messages import ALIVE_S

SILENT_S = 30.0  # seconds without a sign after which a rank is silent
SLOW_FACTOR = 2.0  # a rank is slow that works more than so many times as long in a step as the median
STRAGGLES_S = 60.0  # seconds of slow steps after which a rank is noted
_LEAST_OWN_S = 0.005  # a rank that works less in a step holds nobody up


@dataclass(frozen=True)
class RankSeen:
    """What was last heard from a rank."""

    process: str
    """Machine and process id."""
    images: int
    """Last completed position."""
    own_s: float
    """Seconds that the rank works in a step, without waiting for other ranks."""
    heard_s: float
    """Unix time in seconds."""


def silent_ranks(ranks: Mapping[int, RankSeen], now: float) -> set[int]:
    """Return the ranks without a sign for SILENT_S at the Unix time `now`, while at least one other rank gives signs.

    A thread of each rank gives the signs, also while the rank waits for others. So a silent rank is stopped, or its
    machine is cut off, or its threads get no time. If no rank gives signs, messages do not arrive, and no rank is
    named.
    """
    silent = {rank for rank, seen in ranks.items() if now - seen.heard_s > SILENT_S}
    speaking = any(now - seen.heard_s <= 2 * ALIVE_S for seen in ranks.values())
    return silent if speaking else set()


def stragglers(ranks: Mapping[int, RankSeen]) -> dict[int, float]:
    """Return the ranks whose work in a step takes more than SLOW_FACTOR times the median, with the median in seconds.

    The median of an even number of ranks is the lower of the two in the middle, so that one of two ranks can be slow.
    """
    if not ranks:
        return {}
    median_s = statistics.median_low(seen.own_s for seen in ranks.values())
    return {rank: median_s for rank, seen in ranks.items() if seen.own_s > max(SLOW_FACTOR * median_s, _LEAST_OWN_S)}
