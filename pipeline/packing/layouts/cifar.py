"""The Python version of CIFAR-10 and CIFAR-100, whose batches are pickles. No object of a pickle is built."""

from __future__ import annotations

import gzip
import io
import pickle
import pickletools
import tarfile
import zlib
from pathlib import PurePosixPath
from typing import IO, Any, cast

import numpy as np

from pipeline.errors import UsageError
from pipeline.packing.archives_and_folders import IMAGES, Tree, require_no_pointer, suffix
from pipeline.packing.image_source import Source
from pipeline.storage import files

_NAMES = {*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", "train", "test", "meta"}
_MOST_BYTES = 300_000_000  # both CIFARs have 186 million
_PIXELS = 3 * 32 * 32
_REMEDY = "get the original archive"


def cifar(tree: Tree) -> Source | None:
    """Read the unpacked Python version of CIFAR-10 or CIFAR-100."""
    paths = {PurePosixPath(path).name: path for path in tree.places if PurePosixPath(path).name in _NAMES}
    if not paths.keys() & {"batches.meta", "meta"} or tree.images:
        return None
    return _source({name: tree.places[path].read(_MOST_BYTES) for name, path in paths.items()})


def cifar_archive(url: str) -> Source:
    """Read cifar-10-python.tar.gz or cifar-100-python.tar.gz. Raises UsageError for any other compressed tar."""
    try:
        with files.reading(url) as file:
            batches = _read_archive(file, url)
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist", "correct the path or URL") from None
    if not batches:
        raise UsageError(f"{url} is compressed, so its images cannot be read one by one", "decompress it first")
    return _source(batches)


def _read_archive(file: IO[bytes], url: str) -> dict[str, bytes]:
    """Return the files of CIFAR in a compressed tar by name, up to the first image. Raises UsageError."""
    batches: dict[str, bytes] = {}
    try:
        with gzip.GzipFile(fileobj=file) as decompressed:
            stream = cast("IO[bytes]", _Bounded(decompressed, url))
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    name = PurePosixPath(member.name).name
                    if suffix(name) in IMAGES:
                        break
                    if name in _NAMES and member.isreg() and not member.issparse():
                        content = tar.extractfile(member)
                        batches[name] = content.read() if content else b""
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, ValueError, zlib.error) as error:
        require_no_pointer(url)
        raise UsageError(f"{url} cannot be read as a tar: {error}", "decompress it first, or replace it") from None
    return batches


class _Bounded:
    """A stream that ends with UsageError where it is longer than CIFAR."""

    def __init__(self, stream: gzip.GzipFile, url: str) -> None:
        self._stream, self._url, self._left = stream, url, _MOST_BYTES

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise UsageError(
                f"{self._url} is compressed, and it is not CIFAR: it has more than {_MOST_BYTES:,} bytes decompressed",
                "decompress it first",
            )
        return data


def _source(files_by_name: dict[str, bytes]) -> Source:
    """Read CIFAR from its batches, by name. Each row is a planar image of 3 072 bytes; it is returned as a PPM file."""
    try:
        batches = {name: _unpickle(data) for name, data in sorted(files_by_name.items())}
        meta = batches.pop("batches.meta" if "batches.meta" in batches else "meta")
        names = _list_of(str, meta.get("label_names") or meta["fine_label_names"])
        if len(set(names)) != len(names):
            raise ValueError("two classes have the same name")
        pixels, labels, keys = [], [], []
        for name, batch in batches.items():
            filenames = _list_of(str, batch["filenames"])
            pixels.append(_rows(batch["data"], len(filenames)))
            numbers = _list_of(int, batch["labels"] if "labels" in batch else batch["fine_labels"])
            if len(numbers) != len(filenames) or not all(0 <= number < len(names) for number in numbers):
                raise ValueError(f"{name}: its labels do not fit its images or classes")
            labels += numbers
            keys += [f"{name}/{file}" for file in filenames]
        stored = np.concatenate(pixels)
    except (KeyError, ValueError) as error:
        raise UsageError(f"CIFAR is incomplete or damaged: {error!r}", _REMEDY) from error
    order = np.argsort(keys, kind="stable")
    is_test = np.array([key.startswith("test") for key in keys])[order]
    stored = stored[order]
    splits = {"test": np.flatnonzero(is_test), "train": np.flatnonzero(~is_test)}
    return Source(
        f"CIFAR-{len(names)}",
        keys=[keys[i] for i in order],
        labels=np.array(labels, dtype=np.int64)[order],
        class_names=names,
        splits={split: ids for split, ids in splits.items() if len(ids)},
        read=lambda i: b"P6 32 32 255\n" + stored[i].transpose(1, 2, 0).tobytes(),
        left_out={},
        local_only=True,
    )


def _list_of(kind: type, values: object) -> list[Any]:
    """Return a list whose elements all have a type. Raises ValueError where they have not."""
    if not isinstance(values, list) or not values or not all(type(value) is kind for value in values):
        raise ValueError(f"a list of {kind.__name__} is missing")
    return values


# --- pickles ---------------------------------------------------------------------------------------------------------


class _Recorded:
    """The arguments and the state with which a pickle would build an object of NumPy. Nothing is built from them."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """An unpickler that builds numbers, texts, lists and dictionaries, and records arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for the object that a pickle names. The stand-in records calls.

        Raises UsageError for every name that no CIFAR batch needs.
        """
        if (module, name) == ("_codecs", "encode"):  # Python 3 writes bytes in this way for Python 2
            return lambda text, encoding: _latin1(text)
        if module.split(".")[0] == "numpy" and name in {"_reconstruct", "ndarray", "dtype", "_frombuffer"}:
            return type(name, (_Recorded,), {})  # a class of its own, since a pickle could change it
        raise UsageError(f"a batch of CIFAR would load {module}.{name}, which no CIFAR batch needs", _REMEDY)


def _latin1(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError("a pickle encodes something that is no text")
    return text.encode("latin1")


def _unpickle(data: bytes) -> dict[str, Any]:
    """Return the dictionary in a pickle. Raises ValueError where there is none, UsageError."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if "PUT" in opcode.name and argument is not None and int(argument) > len(data):
                raise ValueError("its memo is larger than the pickle")  # the unpickler would take this much memory
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except (
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(f"a pickle cannot be read: {error}") from error
    except (MemoryError, RecursionError, OverflowError) as error:
        raise ValueError(f"a pickle is too large: {error!r}") from error
    if not isinstance(content, dict):
        raise ValueError("a pickle holds no dictionary")
    return content


def _rows(recorded: object, count: int) -> np.ndarray:
    """Return the images of a batch, uint8 [count, 3, 32, 32], from a recorded array [count, 3072].

    NumPy pickles an array as `_reconstruct(ndarray, …)` with the state (version, shape, dtype, is_fortran, bytes), or
    as `_frombuffer(bytes, dtype, shape, order)`. Raises ValueError where it is no array of this kind and size.
    """
    if not isinstance(recorded, _Recorded):
        raise ValueError("the images are no array")
    kind = type(recorded).__name__
    if kind == "_reconstruct" and isinstance(recorded.state, tuple) and len(recorded.state) == 5:
        _, shape, dtype, is_fortran, data = recorded.state
    elif kind == "_frombuffer" and len(recorded.arguments) == 4:
        data, dtype, shape, order = recorded.arguments
        is_fortran = order == "F"
    else:
        raise ValueError("the images are no array")
    if isinstance(data, str):  # Python 2 pickles bytes as text
        data = data.encode("latin1")
    if not isinstance(dtype, _Recorded) or dtype.arguments[:1] not in (("u1",), ("|u1",)):
        raise ValueError("the images are no array of bytes")
    if shape != (count, _PIXELS) or not isinstance(data, bytes | bytearray) or len(data) != count * _PIXELS:
        raise ValueError(f"the array of images has not {count} rows of {_PIXELS} bytes")
    flat = np.frombuffer(data, dtype=np.uint8)
    return flat.reshape((count, _PIXELS), order="F" if is_fortran else "C").reshape(count, 3, 32, 32)
