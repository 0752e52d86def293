"""Networks that turn images into features and logits, each known by the digest of its weights file."""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import EnvironmentFault, UsageError
from pipeline.evaluation.fidelity import import_torch_fidelity
from pipeline.storage import files

PUBLISHED_INCEPTION = "6726825d"  # how the SHA-256 of the published weights file begins
INCEPTION_FILE = f"weights-inception-2015-12-05-{PUBLISHED_INCEPTION}.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
DEFAULT_WEIGHTS = f"~/.cache/sagan/{INCEPTION_FILE}"

Network = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Extractor:
    """`extractor(images)`: uint8 [n, 3, H, W] → (features float32 [n, D], logits float32 [n, K])."""

    name: str
    digest: str
    """SHA-256 of the weights file."""
    network: Network
    resize: str = "none"
    """`none`, or how images reach the network's resolution."""
    device: str = "cpu"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images.to(self.device))
        return features.float(), logits.float()

    def metric(self, kind: Literal["fd", "isc", "kid"]) -> str:
        """What a metric on these features may be called: plain `fid`, `isc`, `kid` for published Inception alone."""
        if self.name != "inception":
            return f"{kind}_{self.name}"
        name = "fid" if kind == "fd" else kind
        return name if self.digest.startswith(PUBLISHED_INCEPTION) else f"{name}_inception_{self.digest[:8]}"


def inception(location: str | None, device: str = "cpu") -> Extractor:
    """torch-fidelity's Inception v3 with weights from a file or URL: 2 048 features, 1 008 unbiased logits.

    Raises EnvironmentFault where the weights are not to be had, UsageError where the file holds something else.
    """
    location = location or DEFAULT_WEIGHTS
    content = _read(
        location,
        f"put {INCEPTION_FILE} there ({INCEPTION_URL}), or name the file in evaluate.weights (a path or URL); "
        "without it, evaluate.extractor: classifier needs no download",
    )
    try:
        weights = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        network = _fidelity_inception(weights)
    except Exception as error:
        raise UsageError(
            f"{location} does not hold torch-fidelity's Inception weights: {_first_line(error)}",
            f"give the file of {INCEPTION_URL} in evaluate.weights",
        ) from error
    return Extractor("inception", hashlib.sha256(content).hexdigest(), network.to(device), "tf1-bilinear-299", device)


def from_file(url: str, resolution: int, device: str = "cpu") -> Extractor:
    """A TorchScript (.ts, .pt) or torch.export (.pt2) file, named by its stem.

    It takes uint8 [n, 3, resolution, resolution] and returns (features [n, D], logits [n, K]).
    Raises EnvironmentFault where there is no such file, UsageError where it is not such a network.
    """
    content = _read(url, "evaluate.extractor is inception, classifier, or the URL of a .ts or .pt2 file")
    stem, suffix = re.sub(r"[^\w.-]", "_", Path(url).stem, flags=re.ASCII), Path(url).suffix
    try:
        if suffix == ".pt2":
            network = torch.export.load(io.BytesIO(content)).module().to(device)
        else:
            network = torch.jit.load(io.BytesIO(content), map_location=device)
        extractor = Extractor(
            f"{stem}-file" if stem in ("inception", "classifier") else stem,
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
    return extractor


def _fidelity_inception(weights: dict[str, Tensor]) -> torch.nn.Module:
    """torch-fidelity unpickles the file it is given, so it gets one that holds our tensors and nothing else."""
    import_torch_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, f"{folder}/weights.pth")
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=f"{folder}/weights.pth"
        )


def _read(url: str, remedy: str) -> bytes:
    try:
        return files.read_bytes(url)
    except FileNotFoundError:
        raise EnvironmentFault(f"there is no extractor file at {url}", remedy) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
