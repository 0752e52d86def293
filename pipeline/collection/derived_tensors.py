"""Tensors that are computed once from a collection and stored beside it, for every run and trial."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.collection.manifest import Collection
from pipeline.errors import CorruptError, EnvironmentFault, SaganError
from pipeline.storage import file_sets, files, validate_json

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
Facts = TypeVar("Facts", bound=BaseModel)
_MOST_HEADER = 2**20  # bytes of names and shapes in a file of tensors
_REMEDY = "delete this folder; it is computed again"
RESULTS = "evaluation"
"""Name of the folder with the results, beside the files of a collection."""
_STORED = re.compile("[a-z].*-([0-9a-f]{8})")


class NoFacts(BaseModel):
    """Facts that are stored for people only."""


def derived(
    collection: Collection,
    name: str,
    make: Callable[[], tuple[Tensors, dict[str, Any]]],
    expected: Tensors,
    facts: type[Facts],
) -> tuple[Tensors, Facts, str]:
    """Return tensors that are stored beside a collection. Where they are missing, compute and store them.

    The set of files is stored at `<collection>/evaluation/<name>-<first 8 digits of the collection's digest>`. Where
    several processes compute it at the same time, the first upload wins and all processes use its tensors. Where the
    collection cannot be written to, the result is not stored, and the next call computes it again.

    Somebody else may have stored the set, so it must have what the caller expects.

    Args:
        collection: The collection.
        name: Name of the result.
        make: Computes the tensors and the facts. Facts are JSON values that are stored in the manifest.
        expected: Tensors on the device `meta` with the names, shapes and dtypes of the result.
        facts: Model that validates the facts.

    Returns:
        The tensors, the facts, and the SHA-256 of the tensors' file.

    Raises CorruptError where the stored set is damaged or is not one file of the expected tensors, and
    EnvironmentFault.
    """
    url = files.join(_folder(collection.url), f"{name}-{collection.digest[:8]}")
    with files.temporary_folder("derived") as folder:
        manifest = file_sets.read_manifest(url)
        if manifest is None:
            tensors, made = make()
            path = folder / "tensors"
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            # Concurrent results with other tensors get other file names.
            path = path.rename(folder / f"{digest[:16]}.safetensors")
            try:
                manifest = file_sets.upload_set(folder, url, **made)
            except EnvironmentFault as fault:
                log.warning("%s is not stored and will be computed again: %s", name, fault.message)
                return tensors, facts.model_validate(made), digest
            except SaganError:  # another process has uploaded its result first
                manifest = file_sets.read_manifest(url)
                if manifest is None:
                    raise
        if len(manifest.files) != 1:
            raise CorruptError(f"{url} has {len(manifest.files)} files instead of one file of tensors", _REMEDY)
        ((file, entry),) = manifest.files.items()
        if entry.size > (most := sum(tensor.nbytes for tensor in expected.values()) + _MOST_HEADER):
            raise CorruptError(f"{url}/{file} has {entry.size:,} bytes, but at most {most:,} are possible", _REMEDY)
        file_sets.fetch_set(url, folder / "stored")
        try:
            tensors = load_file(folder / "stored" / file)
        except SafetensorError as error:
            raise CorruptError(f"{url}/{file} does not hold tensors: {error}", _REMEDY) from error
        _check(tensors, expected, f"{url}/{file}")
        where = files.join(url, file_sets.MANIFEST)
        return tensors, validate_json.validate(facts, manifest.facts, where, "the manifest of a result"), entry.sha256


def stored_results(url: str) -> dict[str, str]:
    """Return the results beside the collection at `url`: their URLs, each with the first digits of the digest.

    The collection need not exist any more. Raises EnvironmentFault.
    """
    names = files.list_folders(_folder(url))
    return {files.join(_folder(url), name): match[1] for name in names if (match := _STORED.fullmatch(name))}


def _folder(url: str) -> str:
    """Return the URL of the folder with the results of the collection at `url`."""
    return files.join(url, RESULTS)


def _check(tensors: Tensors, expected: Tensors, url: str) -> None:
    """Raise CorruptError where stored tensors have other names, shapes or dtypes than the expected ones."""
    for name in sorted(tensors.keys() | expected.keys()):
        stored, wanted = (
            f"{t.dtype} {list(t.shape)}" if (t := of.get(name)) is not None else "absent" for of in (tensors, expected)
        )
        if stored != wanted:
            raise CorruptError(f"{url}: {name:.200} is {stored:.200}; it must be {wanted}", _REMEDY)
