"""Loads extractors from TorchScript and torch.export files. Such a file is a program."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch.export.passes import move_to_device_pass

from pipeline.errors import CorruptError, EnvironmentFault, UsageError, shown_url
from pipeline.evaluation.extractors import published_networks
from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.progress import progress
from pipeline.storage import files


def extractor_from_file(
    url: str, resolution: int, device: str = "cpu", *, sha256: str | None = None, trusted: bool = False
) -> Extractor:
    """Load a TorchScript (.ts, .pt) or torch.export (.pt2) file. The extractor is named by the stem of the file.

    Args:
        url: Path or URL of the file. `torch.jit.load` and `torch.export.load` run code that the file contains.
        resolution: The network takes uint8 [n, 3, resolution, resolution] and returns (features [n, D], logits [n, K]).
        device: Device of the extractor.
        sha256: SHA-256 in hex of the file that the user trusts. It is compared before the file is interpreted.
        trusted: Whether the user trusts the file whatever its SHA-256 is.

    Raises:
        EnvironmentFault: The file does not exist.
        CorruptError: The file has another SHA-256 than `sha256`.
        UsageError: The user does not trust the file, or it does not contain a network of this form.
    """
    content = read_extractor_file(
        url, "set evaluate.extractor to the name of an extractor, or to the URL of a .ts or .pt2 file"
    )
    digest = hashlib.sha256(content).hexdigest()
    _require_trust(url, digest, sha256, trusted)
    stem, suffix = re.sub(r"[^\w.-]", "_", Path(url).stem, flags=re.ASCII), Path(url).suffix
    try:
        if suffix == ".pt2":
            # A program names its device in its operators too; `.to(device)` would move its parameters alone.
            program = move_to_device_pass(torch.export.load(io.BytesIO(content)), device)
            network = program.module()
        else:
            network = torch.jit.load(io.BytesIO(content), map_location=device).eval()
            network = torch.jit.freeze(network.to(memory_format=torch.channels_last))  # a third faster on CPUs
        extractor = Extractor(
            f"{stem}-file" if stem in ("classifier", *published_networks.names()) else stem,
            digest,
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


def _require_trust(url: str, digest: str, sha256: str | None, trusted: bool) -> None:
    """Raise CorruptError or UsageError unless the user named the file's SHA-256 or trusts the file."""
    if sha256 is not None and digest != sha256:
        raise CorruptError(
            f"{url} has SHA-256 {digest}, but evaluate.extractor_sha256 is {sha256}: it is another file",
            "get the file that you trust; do not set its new SHA-256 unless you know why the file changed",
        )
    if sha256 is None and not trusted:
        raise UsageError(
            f"{url} is a program, which runs with your rights. Its SHA-256 is {digest}",
            f"if you trust the file, write evaluate.extractor_sha256: {digest} (--extractor-sha256 {digest}); "
            "evaluate.trust_extractor: true (--trust-extractor) accepts any content of the file",
        )


def read_extractor_file(url: str, remedy: str) -> bytes:
    """Return the content of a file. Raises EnvironmentFault, with `remedy` where the file does not exist."""
    try:
        if files.is_local(url):
            return files.read_bytes(url)
        with (
            files.temporary_folder("weights") as folder,
            progress(f"fetching {shown_url(url)}", files.size(url), "bytes") as advance,
        ):
            path = folder / "file"
            files.download(url, path, advance=advance)
            return path.read_bytes()
    except FileNotFoundError:
        raise EnvironmentFault(f"there is no extractor file at {url}", remedy) from None


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
