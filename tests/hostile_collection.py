"""Collections as a hostile author packs them: any manifest and any index, with digests that fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy


def contents_below(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of modification of every file below a folder, by its path."""
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_index(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the columns, and correct their entry in the manifest."""
    columns = {
        name: column.copy() for name, column in safetensors.numpy.load_file(folder / "index.safetensors").items()
    }
    change(columns)
    write_index(folder, safetensors.numpy.save(columns))


def write_index(folder: Path, data: bytes) -> None:
    (folder / "index.safetensors").write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change_manifest(folder, lambda manifest: manifest.update(index=entry))
