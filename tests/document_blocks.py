"""Blocks of the documents that are marked as runnable: `<!-- test -->` or `<!-- test: NAME -->` above a code block."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"<!-- test(?:: (\w+))? -->\n```(\w+)\n(.*?)```", re.DOTALL)


def blocks(document: str) -> list[tuple[str, str, str]]:
    """(name or "", language, code) of every marked block of a document."""
    found: list[tuple[str, str, str]] = _BLOCK.findall((ROOT / document).read_text())
    return found


def block(document: str, name: str) -> str:
    """Code of the block with that name."""
    (code,) = [code for found, _, code in blocks(document) if found == name]
    return code
