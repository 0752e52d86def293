"""Watches for nodes of the cluster that will be taken away."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress

from pipeline.compute.cluster import LeavingNode, leaving_nodes

WATCH_S = 1.0  # seconds between two looks


class NodeWatch:
    """A thread that asks Ray which nodes drain, since the driver must not wait for an answer."""

    def __init__(self) -> None:
        self.leaving: Sequence[LeavingNode] = ()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="nodes", daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_S):
            with suppress(Exception):  # the head does not answer, and Ray raises errors of many kinds then
                self.leaving = leaving_nodes()
