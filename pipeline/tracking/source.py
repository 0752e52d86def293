"""Which code this is."""

from __future__ import annotations

import subprocess
from pathlib import Path

CODE = Path(__file__).parents[2]
PACKAGES = ("sagan", "pipeline")
UNKNOWN = "unknown"


def commit(code: Path = CODE) -> str:
    """Git commit of the checkout that this code runs from, `…-dirty` where its packages were changed since.

    Without one (an image, a submitted working directory, an installed package) what a file COMMIT beside the packages
    says, else `unknown`.
    """
    try:
        # the path, since an environment for packages may lie inside a checkout of something else
        head = _git(code, "rev-parse", "HEAD", f"HEAD:./{PACKAGES[0]}").split()[0]
        return f"{head}-dirty" if _git(code, "status", "--porcelain", "--", *PACKAGES) else head
    except (OSError, subprocess.CalledProcessError):
        told = code / "COMMIT"
        return told.read_text().strip() if told.exists() else UNKNOWN


def _git(code: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(code), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
