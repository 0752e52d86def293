"""Blocks of the documents that are marked as runnable: `<!-- test -->` or `<!-- test: NAME -->` above a code block."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^( *)<!-- test(?:: (\w+))? -->\n\1```(\w+)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def blocks(document: str) -> list[tuple[str, str, str]]:
    """(name or "", language, code) of every marked block of a document."""
    found: list[tuple[str, str, str, str]] = _BLOCK.findall((ROOT / document).read_text())
    return [(name, language, textwrap.dedent(code)) for _, name, language, code in found]


def block(document: str, name: str) -> str:
    """Code of the block with that name."""
    (code,) = [code for found, _, code in blocks(document) if found == name]
    return code
