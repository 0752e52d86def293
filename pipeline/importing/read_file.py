"""Reads the tensors of a torch file or a .safetensors file. Nothing in the file runs."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.importing.foreign_tensors import ForeignTensors


def read_file(path: Path, source: str) -> ForeignTensors:
    """Read the tensors of a file.

    A torch file holds a state dict, or a dictionary with a state dict under `state_dict`. torch reads it with
    `weights_only`.

    Args:
        path: The file.
        source: Path or URL of the file, for messages.

    Raises UsageError where the file holds something else.
    """
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _torch_file(path)
    except UnpicklingError as error:  # also of bytes that no pickle has
        if not (found := re.search(r"GLOBAL (\S+)", str(error))):
            raise UsageError(f"{source} is no file of torch.save, or is damaged", "download the file again") from error
        raise UsageError(
            f"{source} holds more than tensors ({found[1]:.200}), and cannot be read without running code",
            "where you trust the file, save its tensors alone: torch.save(dict(G.state_dict()), FILE)",
        ) from error
    except Exception as error:  # any, because the bytes may be anything
        raise UsageError(f"{source} cannot be read: {_first_line(error)}", "download the file again") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"{source} holds no state dict", "give the file with the generator's tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UsageError(
                f"{source} holds no state dict: its entry {str(name)[:200]!r} is no tensor",
                "give the file with the generator's tensors by name",
            )
    return ForeignTensors(content, source, path.stat().st_size)


def _torch_file(path: Path) -> Any:
    """Return what a file of torch.save holds, on the CPU. Raises ValueError, and torch's own errors."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("the archive is compressed")  # it could hold far more bytes than the file
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("the entries of the archive overlap")
    return torch.load(path, weights_only=True, map_location="cpu")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
