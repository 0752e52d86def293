"""Shares of a worker's time, for the log."""

from __future__ import annotations

import time


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
