"""A worker's time: shares of it for the log, and the age of its process."""

from __future__ import annotations

import os
import time
from pathlib import Path


def process_age_s() -> float:
    """Return the seconds since this process began, as Linux counts them."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # from the third field on
    began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 is the start of the process since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began_s


class TimeShares:
    """Shares of the time of rank 0 since the last log: waiting for data, checkpoints, and scores on rank 0.

    The remaining time is spent in steps.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.data = self.checkpoint = self.evaluation = 0.0

    def metrics(self, images: int) -> dict[str, float]:
        """Return images per second over `images` images, and the shares, in [0, 1]."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return {
            "images_per_s": images / seconds,
            "data_wait_share": self.data / seconds,
            "checkpoint_share": self.checkpoint / seconds,
            "evaluation_share": self.evaluation / seconds,
        }
