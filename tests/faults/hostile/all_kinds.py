"""All kinds of foreign input. The modules of this folder define them, one for each sort of file."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from tests.faults.hostile import (
    imported_generators,
    job_files,
    models,
    pack_sources,
    packed_collections,
    registered_models,
    runs_and_sweeps,
)

_MODULES = (
    packed_collections,
    pack_sources,
    job_files,
    runs_and_sweeps,
    models,
    imported_generators,
    registered_models,
)
KINDS = {name: kind for module in _MODULES for name, kind in module.KINDS.items()}


def build(root: Path) -> None:
    """Write the clean input of every kind below `root`, with the project's own functions."""
    with contextlib.redirect_stdout(io.StringIO()):
        for module in _MODULES:  # in this order: a run reads a collection, and a registry holds a model
            module.build(root)
