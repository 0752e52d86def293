"""Files of real images, for benchmarks that need them."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def real_file(name: str) -> Path:
    """Return the path of a file of SAGAN_TEST_DATA. End the process with exit code 2 where there is no such file."""
    folder = os.environ.get("SAGAN_TEST_DATA")
    if folder and (path := Path(folder, name)).is_file():
        return path
    reason = f"SAGAN_TEST_DATA={folder} has no file {name}" if folder else f"SAGAN_TEST_DATA is not set: no {name}"
    print(f"error: {reason}\n  → tests/README.md says what the folder holds", file=sys.stderr)
    sys.exit(2)
