"""The git commit of the code that runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

CODE = Path(__file__).parents[2]
PACKAGES = ("sagan", "pipeline")
UNKNOWN = "unknown"


def git_commit(code: Path = CODE) -> str:
    """Return the git commit of the checkout at `code`, with `-dirty` appended if a package has changed since.

    An image, a submitted working directory and an installed package are not checkouts. For them the function returns
    the text of the file COMMIT beside the packages, or `unknown` where there is no such file.
    """
    try:
        # The second argument fails in a checkout of another project that contains this environment's packages.
        head = _git(code, "rev-parse", "HEAD", f"HEAD:./{PACKAGES[0]}").split()[0]
        return f"{head}-dirty" if _git(code, "status", "--porcelain", "--", *PACKAGES) else head
    except (OSError, subprocess.CalledProcessError):
        commit_file = code / "COMMIT"
        return commit_file.read_text().strip() if commit_file.exists() else UNKNOWN


def _git(code: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(code), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
