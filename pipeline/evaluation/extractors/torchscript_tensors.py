"""Reads the tensors of a TorchScript archive without running its code."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.jit import _pickle


class _Module:
    """An inert stand-in for every class of the archive. It only holds attributes."""

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)


def torchscript_tensors(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a TorchScript archive by name, on the CPU.

    `torch.jit.load` runs code of the archive. This function reads only the archive's tensors and `data.pkl`, with
    torch's unpickler for `weights_only`. Raises ValueError, zipfile.BadZipFile or torch's own errors where the content
    is something else.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {
            name: entry
            for entry in archive.infolist()
            if (name := entry.filename.partition("/")[2]) in ("data.pkl", "byteorder", "version")
            or name.startswith("data/")
        }
        if "data.pkl" not in entries:
            raise ValueError("the archive has no data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("the archive is compressed")  # it could hold far more bytes than the file
        names = {
            str(argument).replace(" ", ".")
            for operation, argument, _ in pickletools.genops(archive.read(entries["data.pkl"]))
            if operation.name == "GLOBAL"
        }
        # torch.load refuses an archive with code. The copy has the layout of a file of torch.save.
        copied = io.BytesIO()
        with zipfile.ZipFile(copied, "w") as copy:
            for name, entry in entries.items():
                copy.writestr(f"archive/{name}", archive.read(entry))
    copied.seek(0)
    classes: list[Any] = [(_Module, name) for name in names if name.startswith("__torch__.")]
    with torch.serialization.safe_globals(classes + _LISTS):
        root = torch.load(copied, weights_only=True, map_location="cpu")
    return dict(_tensors(root, ""))


# They return their first argument. Older archives mark their lists with them.
_LISTS: list[Any] = [_pickle.restore_type_tag, _pickle.build_intlist, _pickle.build_tensorlist]


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, _Module):
        for key, inner in vars(value).items():
            yield from _tensors(inner, f"{name}.{key}" if name else key)
