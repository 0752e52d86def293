"""A fuzzer: changes foreign files and rows at random, gives them to the public commands, and counts what happens.

    python -m tests.faults.hostile [--seed N] [--minutes M] [--inputs N] [--only KIND:NUMBER] [--failures FOLDER]

The seed, the kind and the number of an input decide about its changes. `read_inputs` says how an input is read and what
counts as a failure. The command prints a table in Markdown. It keeps the inputs that fail in a folder, and then ends
with exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.faults.hostile.read_inputs import (
    FAILURES,
    KINDS,
    REFUSED,
    RIGHT,
    Ground,
    inputs_in_turn,
    measure_clean,
    read_inputs,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument(
        "--inputs", type=int, help="number of inputs over all kinds; default: 20 000, or until the time"
    )
    parser.add_argument("--only", help="read one input, and show what the command prints; or all inputs of one kind")
    parser.add_argument("--failures", type=Path, help="folder for the inputs that fail; default: a new one")
    options = parser.parse_args()
    most = options.inputs if options.inputs or options.minutes else 20_000
    failures = options.failures or Path(tempfile.gettempdir()) / f"sagan-hostile-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="sagan-hostile-") as folder:
        ground = Ground(Path(folder).resolve(), options.seed, failures)
        ground.plant()
        measure_clean(ground)
        inputs: Iterator[tuple[str, int]] = itertools.islice(inputs_in_turn(), most)
        if options.only in KINDS:
            inputs = iter([(options.only, number) for number in range(most or 20_000)])
        elif options.only:
            name, _, number = options.only.rpartition(":")
            inputs, ground.show = iter([(name, int(number))]), True
        began = time.monotonic()
        counts: dict[str, Counter[str]] = {}
        with contextlib.suppress(KeyboardInterrupt):
            read_inputs(ground, inputs, began + 60 * (options.minutes or float("inf")), counts)
        minutes = (time.monotonic() - began) / 60
    total = sum(counts.values(), Counter[str]())
    print(_table({**counts, "all": total}))
    print(f"\nseed {options.seed}: {total['tried']:,} inputs in {minutes:.1f} minutes", flush=True)
    failed = any(total[what] for what in FAILURES)
    if failed:
        print(f"the inputs that failed are in {failures}")
    return int(failed)


def _table(counts: dict[str, Counter[str]]) -> str:
    """Return the counts of each row as a table in Markdown."""
    columns = ("tried", REFUSED, RIGHT, *FAILURES)
    rows = [("kind", *columns), ("---",) * (1 + len(columns))]
    rows += [(row, *(f"{count[column]:,}".replace(",", " ") for column in columns)) for row, count in counts.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
