"""Tensors that are computed once from a collection, kept beside it and used by every run and trial."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.data.index import Collection
from pipeline.errors import EnvironmentFault, SaganError
from pipeline.storage import files, fileset

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


def derived(
    collection: Collection, name: str, make: Callable[[], tuple[Tensors, dict[str, Any]]]
) -> tuple[Tensors, dict[str, Any], str]:
    """(tensors, facts, SHA-256 of their file) of what stands at `<collection>/evaluation/<name>-<collection digest8>`.

    Where nothing stands there, `make` computes tensors and facts, and they are stored. Of several that do so at a time
    the first wins, and all use its numbers. A collection that cannot be written to is only read: then `make` runs again
    next time.
    """
    url = files.join(collection.url, "evaluation", f"{name}-{collection.digest[:8]}")
    with tempfile.TemporaryDirectory(prefix="sagan-derived-") as temp:
        folder = Path(temp)
        manifest = fileset.read_manifest(url)
        if manifest is None:
            tensors, facts = make()
            path = folder / "made"
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            path = path.rename(folder / f"{digest[:16]}.safetensors")  # rivals with other numbers write another file
            try:
                manifest = fileset.commit(folder, url, **facts)
            except EnvironmentFault as fault:
                log.warning("%s is not kept for others: %s", name, fault.message)
                return tensors, facts, digest
            except SaganError:  # another was faster
                manifest = fileset.read_manifest(url)
                if manifest is None:
                    raise
        fileset.fetch(url, folder / "stored")
        ((file, entry),) = manifest.files.items()
        return load_file(folder / "stored" / file), manifest.facts, entry.sha256
