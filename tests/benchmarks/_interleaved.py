"""Variants of a benchmark as processes of their own, each of which works whenever it is told.

Memory and settings are their own, and they take turns, round after round, so that a machine whose speed drifts does not
decide.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

Figures = dict[str, float]


class Server:
    """`python -m MODULE ARGUMENTS` with `environment` beside what this process has, but for allocator settings."""

    def __init__(self, module: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "PYTORCH_ALLOC"))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=inherited | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def answer(self) -> Figures:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            sys.exit(f"a variant ended with code {self._process.wait()}")
        figures: Figures = json.loads(line)
        return figures

    def go(self) -> Figures:
        self.ask()
        return self.answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(work: Callable[[], Figures]) -> None:
    """A server's side: work once per line until there are no more."""
    for _ in sys.stdin:
        print(json.dumps(work()), flush=True)


def median_ratio(base: Sequence[Figures], rows: Sequence[Figures], key: str = "seconds") -> float:
    """base / rows, round by round."""
    return statistics.median(b[key] / r[key] for b, r in zip(base, rows, strict=True))
