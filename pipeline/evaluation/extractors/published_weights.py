"""Loads published networks by name, with their published parameters or with others of the same shapes."""

from __future__ import annotations

import hashlib

import torch

from pipeline.errors import CorruptError, UsageError
from pipeline.evaluation.extractors import published_networks
from pipeline.evaluation.extractors.extractor import Dtype, Extractor
from pipeline.evaluation.extractors.extractor_file import first_line, read_extractor_file
from pipeline.storage import files


def load_published(
    name: str,
    location: str | None,
    *,
    resize: published_networks.Resize = "fidelity",
    dtype: Dtype = "float32",
    download: bool = False,
    device: str = "cpu",
) -> Extractor:
    """Load a network of torch-fidelity.

    Args:
        name: Name of the network.
        location: Path or URL of the file of parameters. None: `default_place`.
        resize: Method that resizes images to the network's resolution.
        dtype: Floating-point type of resize, network and features.
        download: Whether a published file that is missing in `default_place` is downloaded there.
        device: Device of the extractor.

    Raises:
        UsageError: The network does not exist, or the file does not contain its parameters.
        EnvironmentFault: The file does not exist or cannot be read.
        CorruptError: The downloaded file is not the published file.
    """
    if name not in published_networks.names():
        raise UsageError(
            f"there is no extractor {name!r}",
            f"use classifier, a .ts or .pt2 file, or one of: {', '.join(published_networks.names())}",
        )
    known = published_networks.published(name)
    assert known is not None
    if location is None:
        location = default_place(known)
        if download and not files.exists(location):
            _download(known, location)
    content = read_extractor_file(
        location,
        f"set evaluate.download: true, or put the file of {known.url} there, or set evaluate.extractor_weights to its "
        "path or URL; evaluate.extractor: classifier needs no file",
    )
    try:
        network = published_networks.network(name, content, resize).to(device, getattr(torch, dtype))
    except Exception as error:
        raise UsageError(
            f"{location} does not hold weights of {name}: {first_line(error)}",
            f"set evaluate.extractor_weights to the file of {known.url}",
        ) from error
    return Extractor(
        name,
        hashlib.sha256(content).hexdigest(),
        network,
        network.resize,
        dtype,
        device,
        has_logits=network.head is not None,
    )


def default_place(known: published_networks.Published) -> str:
    """Return the path where a node keeps a published file."""
    return f"~/.cache/sagan/{files.name(known.url)}"


def _download(known: published_networks.Published, place: str) -> None:
    content = read_extractor_file(known.url, "set evaluate.extractor_weights to the path or URL of the file")
    digest = hashlib.sha256(content).hexdigest()
    if known.digest and digest != known.digest:
        raise CorruptError(
            f"{known.url} is not the published file: its SHA-256 is {digest}, not {known.digest}",
            "get the file elsewhere, and set evaluate.extractor_weights to its path or URL",
        )
    files.write_bytes(place, content)
