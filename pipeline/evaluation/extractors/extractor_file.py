"""Loads extractors from TorchScript and torch.export files."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.errors import EnvironmentFault, UsageError
from pipeline.evaluation.extractors import fidelity_networks
from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.progress import progress
from pipeline.storage import files


def extractor_from_file(url: str, resolution: int, device: str = "cpu") -> Extractor:
    """Load a TorchScript (.ts, .pt) or torch.export (.pt2) file. The extractor is named by the stem of the file.

    The network takes uint8 [n, 3, resolution, resolution] and returns (features [n, D], logits [n, K]). Raises
    EnvironmentFault where the file does not exist, UsageError where it does not contain a network of this form.
    """
    content = read_extractor_file(
        url, "set evaluate.extractor to the name of an extractor, or to the URL of a .ts or .pt2 file"
    )
    stem, suffix = re.sub(r"[^\w.-]", "_", Path(url).stem, flags=re.ASCII), Path(url).suffix
    try:
        if suffix == ".pt2":
            network = torch.export.load(io.BytesIO(content)).module().to(device)
        else:
            network = torch.jit.load(io.BytesIO(content), map_location=device).eval()
            network = torch.jit.freeze(network.to(memory_format=torch.channels_last))  # a third faster on CPUs
        extractor = Extractor(
            f"{stem}-file" if stem in ("classifier", *fidelity_networks.names()) else stem,
            hashlib.sha256(content).hexdigest(),
            network,
            device=device,
        )
        shapes = [tuple(output.shape) for output in extractor(torch.zeros(2, 3, resolution, resolution).byte())]
    except Exception as error:
        raise UsageError(
            f"{url} cannot be used as an extractor for {resolution} px images: {first_line(error)}",
            "give a TorchScript (.ts) or torch.export (.pt2) file whose network takes uint8 [n, 3, H, W] with any n "
            "and returns (features [n, D], logits [n, K])",
        ) from error
    if any(len(shape) != 2 or shape[0] != 2 for shape in shapes):
        raise UsageError(
            f"{url} returns tensors of shape {shapes} for two images",
            "give a network that returns features [n, D] and logits [n, K]",
        )
    return replace(extractor, has_logits=shapes[1][1] > 0)


def read_extractor_file(url: str, remedy: str) -> bytes:
    """Return the content of a file. Raises EnvironmentFault, with `remedy` where the file does not exist."""
    try:
        if files.is_local(url):
            return files.read_bytes(url)
        with (
            files.temporary_folder("weights") as folder,
            progress(f"fetching {url}", files.size(url), "bytes") as advance,
        ):
            path = folder / "file"
            files.download(url, path, advance=advance)
            return path.read_bytes()
    except FileNotFoundError:
        raise EnvironmentFault(f"there is no extractor file at {url}", remedy) from None


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
