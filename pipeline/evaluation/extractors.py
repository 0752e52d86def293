"""Networks that turn images into features and logits, each known by the digest of its weights file."""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import CorruptError, EnvironmentFault, UsageError
from pipeline.evaluation import fidelity
from pipeline.evaluation.progress import progress
from pipeline.storage import files

Network = Callable[[Tensor], tuple[Tensor, Tensor]]
Precision = Literal["float32", "float64"]


@dataclass(frozen=True)
class Extractor:
    """`extractor(images)`: uint8 [n, 3, H, W] → (features [n, D], logits [n, K]), both of `precision`."""

    name: str
    digest: str
    """SHA-256 of the weights file."""
    network: Network
    resize: str = "none"
    """`none`, or how images reach the network's resolution."""
    precision: Precision = "float32"
    device: str = "cpu"
    has_logits: bool = True
    """Whether K > 0."""

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        dtype = getattr(torch, self.precision)
        features, logits = self.network(images.to(self.device))
        return features.to(dtype), logits.to(dtype)

    def metric(self, kind: Literal["fd", "isc", "kid"]) -> str:
        """What a metric on these features may be called.

        Plain `fid`, `isc`, `kid` mean published Inception behind TensorFlow's resize alone. Weights of a known network
        that are not known to be the published ones are named by their digest, the other resize by `clean`.
        """
        known = fidelity.published(self.name)
        strange = known is not None and not (known.digest and self.digest.startswith(known.digest))
        named = [] if self.name == "inception" and not strange else [self.name]
        other = [self.digest[:8]] if strange else []
        clean = ["clean"] if self.resize.startswith("clean") else []
        return "_".join(["fid" if (kind, self.name) == ("fd", "inception") else kind, *named, *other, *clean])


def pretrained(
    name: str,
    location: str | None,
    *,
    resize: fidelity.Resize = "fidelity",
    precision: Precision = "float32",
    download: bool = False,
    device: str = "cpu",
) -> Extractor:
    """A network of torch-fidelity with weights from a file or URL, or from where the published ones are kept.

    Where they are not, `download` fetches them once. Raises EnvironmentFault where the weights are not to be had,
    UsageError where the file holds something else or there is no such network, CorruptError where what was downloaded
    is not what is published.
    """
    if name not in fidelity.names():
        raise UsageError(
            f"there is no extractor {name!r}",
            f"use classifier, a .ts or .pt2 file, or one of: {', '.join(fidelity.names())}",
        )
    known = fidelity.published(name)
    assert known is not None
    if location is None:
        location = default_place(known)
        if download and not files.exists(location):
            _download(known, location)
    content = _read(
        location,
        f"put the file of {known.url} there (evaluate.download: true does), or name it in evaluate.weights (a path or "
        "URL); without it, evaluate.extractor: classifier needs no download",
    )
    try:
        network = fidelity.network(name, content, resize).to(device, getattr(torch, precision))
    except Exception as error:
        raise UsageError(
            f"{location} does not hold weights of {name}: {_first_line(error)}",
            f"give the file of {known.url} in evaluate.weights",
        ) from error
    return Extractor(
        name,
        hashlib.sha256(content).hexdigest(),
        network,
        network.resize,
        precision,
        device,
        has_logits=network.head is not None,
    )


def default_place(known: fidelity.Published) -> str:
    """Where a node keeps a published file."""
    return f"~/.cache/sagan/{files.name(known.url)}"


def from_file(url: str, resolution: int, device: str = "cpu") -> Extractor:
    """A TorchScript (.ts, .pt) or torch.export (.pt2) file, named by its stem.

    It takes uint8 [n, 3, resolution, resolution] and returns (features [n, D], logits [n, K]).
    Raises EnvironmentFault where there is no such file, UsageError where it is not such a network.
    """
    content = _read(url, "evaluate.extractor is a name, or the URL of a .ts or .pt2 file")
    stem, suffix = re.sub(r"[^\w.-]", "_", Path(url).stem, flags=re.ASCII), Path(url).suffix
    try:
        if suffix == ".pt2":
            network = torch.export.load(io.BytesIO(content)).module().to(device)
        else:
            network = torch.jit.load(io.BytesIO(content), map_location=device).eval()
            network = torch.jit.freeze(network.to(memory_format=torch.channels_last))  # a third faster on CPUs
        extractor = Extractor(
            f"{stem}-file" if stem in ("classifier", *fidelity.names()) else stem,
            hashlib.sha256(content).hexdigest(),
            network,
            device=device,
        )
        shapes = [tuple(output.shape) for output in extractor(torch.zeros(2, 3, resolution, resolution).byte())]
    except Exception as error:
        raise UsageError(
            f"{url} cannot be used as an extractor for {resolution} px images: {_first_line(error)}",
            "it must be TorchScript (.ts) or torch.export (.pt2), take uint8 [n, 3, H, W] with any n and return "
            "(features [n, D], logits [n, K])",
        ) from error
    if any(len(shape) != 2 or shape[0] != 2 for shape in shapes):
        raise UsageError(f"{url} returns tensors of shape {shapes} for two images", "it must return [n, D] and [n, K]")
    return replace(extractor, has_logits=shapes[1][1] > 0)


def _download(known: fidelity.Published, place: str) -> None:
    content = _read(known.url, "give the file's place in evaluate.weights")
    digest = hashlib.sha256(content).hexdigest()
    if known.digest and not digest.startswith(known.digest):
        raise CorruptError(
            f"{known.url} is not the published file: its SHA-256 begins with {digest[:8]}, not {known.digest[:8]}",
            "get the file elsewhere and name it in evaluate.weights",
        )
    files.write_bytes(place, content)


def _read(url: str, remedy: str) -> bytes:
    try:
        if files.is_local(url):
            return files.read_bytes(url)
        with (
            tempfile.TemporaryDirectory(prefix="sagan-weights-") as folder,
            progress(files.size(url), f"fetching {url}", "bytes") as advance,
        ):
            path = Path(folder) / "file"
            files.download(url, path, advance=advance)
            return path.read_bytes()
    except FileNotFoundError:
        raise EnvironmentFault(f"there is no extractor file at {url}", remedy) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
