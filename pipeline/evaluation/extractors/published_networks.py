"""Builds torch-fidelity's networks by name from the content of a weights file, and imports torch-fidelity."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.evaluation.extractors.dinov2 import dinov2
from pipeline.evaluation.extractors.torchscript_tensors import torchscript_tensors
from pipeline.storage import files

Resize = Literal["fidelity", "clean"]

# (mean, standard deviation) of each channel, for pixel values 0 … 255
INCEPTION = (128.0, 128.0, 128.0), (128.0, 128.0, 128.0)
IMAGENET = (255 * 0.485, 255 * 0.456, 255 * 0.406), (255 * 0.229, 255 * 0.224, 255 * 0.225)
CLIP = (255 * 0.48145466, 255 * 0.4578275, 255 * 0.40821073), (255 * 0.26862954, 255 * 0.26130258, 255 * 0.27577711)


@dataclass(frozen=True)
class Published:
    """The published file with a network's parameters."""

    url: str
    digest: str | None
    """SHA-256 of the file in hex. None where it is not known (DINOv2)."""


def names() -> list[str]:
    """Return the names of all networks in this module."""
    import_torch_fidelity()
    from torch_fidelity.feature_extractor_clip import MODEL_URLS

    return [*FILES, *MODEL_URLS]


def published(name: str) -> Published | None:
    """Return the published file of a network, or None where `name` is not a network of torch-fidelity."""
    if not name.startswith("clip-"):
        return FILES.get(name)
    import_torch_fidelity()
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

    return Published(MODEL_URLS[name], MODEL_METADATA[name]["hash"]) if name in MODEL_URLS else None


FILES = {
    "inception": Published(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "vgg16": Published(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    **{
        f"dinov2-vit-{size}-14": Published(
            f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{size}14/dinov2_vit{size}14_pretrain.pth", None
        )
        for size in "sblg"
    },
}


class Network(nn.Module):
    """Maps images uint8 [n, 3, H, W] to (features [n, D], logits [n, K]). K is 0 without a head.

    The network resizes images to `side` pixels and normalises them. `body` computes features of the images, and `head`
    computes logits of the features. All computation uses the dtype that `to` sets. torch-fidelity's own `forward` can
    only compute in float32 (version 0.4.0 treats float64 as float32), so only its layers are used.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        body: nn.Module,
        side: int,
        mean: Sequence[float],
        deviation: Sequence[float],
        head: nn.Module | None = None,
        *,
        resize: Resize,
    ) -> None:
        super().__init__()
        self.body, self.head, self.side = body, head, side
        name, self._resized = _RESIZES[resize]
        self.resize = f"{name}-{side}"
        for buffer, values in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(buffer, torch.tensor(values, dtype=torch.float64)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self._resized(images, self.side, self.mean.dtype)
        features = self.body((x - self.mean) / self.deviation)
        return features, features[:, :0] if self.head is None else self.head(features)


def network(name: str, content: bytes, resize: Resize) -> Network:
    """Build the network of a name in `names()`, in float32, from the content of its file of parameters.

    The file contains a state dict, which is read without running code. CLIP's files are OpenAI's TorchScript archives,
    of which only the tensors are read. Raises torch's own errors where the content is something else.
    """
    import_torch_fidelity()
    if name.startswith("clip-"):
        body = _clip(torchscript_tensors(content))
        return Network(body, body.input_resolution, *CLIP, resize=resize)
    weights = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    if name == "inception":
        body, head = _inception(weights)
        return Network(body, 299, *INCEPTION, head, resize=resize)
    return Network(_vgg16(weights) if name == "vgg16" else _dinov2(name, weights), 224, *IMAGENET, resize=resize)


def _inception(weights: dict[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    """Return a body of 2 048 features, and a head of 1 008 logits without bias."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    *layers, head = _filled(FeatureExtractorInceptionV3, "inception-v3-compat", "2048", weights).children()
    head.bias = None
    return nn.Sequential(*layers, nn.Flatten()), head


def _vgg16(weights: dict[str, Tensor]) -> nn.Module:
    """Return a body of 4 096 features: the last hidden layer."""
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

    return nn.Sequential(_filled(FeatureExtractorVGG16, "vgg16", "fc2_relu", weights).model, nn.ReLU())


def _clip(weights: dict[str, Tensor]) -> Any:
    """Return a body of 512 to 1 024 features: the image embedding that CLIP compares with text embeddings."""
    from torch_fidelity.feature_extractor_clip import build_model

    return build_model(dict(weights), torch.float32).visual


def _dinov2(name: str, weights: dict[str, Tensor]) -> nn.Module:
    """Return a body of 384 to 1 536 features: the class token."""
    body = dinov2(name)
    # The mask token is for training only.
    body.load_state_dict({key: tensor for key, tensor in weights.items() if key != "mask_token"})
    return body


def _filled(network: type[nn.Module], name: str, features: str, weights: dict[str, Tensor]) -> Any:
    """Build a network of torch-fidelity from `weights`.

    torch-fidelity unpickles its file of parameters. It therefore gets a file that contains only these tensors.
    """
    with files.temporary_folder("weights") as folder:
        torch.save(weights, f"{folder}/weights.pth")
        return network(name, [features], feature_extractor_weights_path=f"{folder}/weights.pth")


# --- resizing --------------------------------------------------------------------------------------------------------


def _as_tensorflow_1(images: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Resize bilinearly without antialiasing, as the network did with which the first FIDs were computed."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return interpolate_bilinear_2d_like_tensorflow1x(images.to(dtype), size=(side, side), align_corners=False)


def _clean(images: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Resize bicubically with antialiasing, without rounding, and clip to 0 … 255, as clean-fid (Parmar et al. 2022).

    clean-fid uses Pillow's filter on float channels. This function computes in float64 and is within 1e-4 of Pillow.
    """
    resized = F.interpolate(images.to(torch.float64), (side, side), mode="bicubic", antialias=True)
    return resized.clamp(0, 255).to(dtype)


_RESIZES: dict[str, tuple[str, Callable[[Tensor, int, torch.dtype], Tensor]]] = {
    "fidelity": ("tf1-bilinear", _as_tensorflow_1),
    "clean": ("clean-bicubic", _clean),
}


# --- import ----------------------------------------------------------------------------------------------------------


def import_torch_fidelity() -> None:
    """Make `import torch_fidelity` work. Its modules can be imported as usual afterwards.

    torch-fidelity imports torchvision. torchvision's PyPI build does not load its operators with a CPU build of torch,
    and then fails to register them. sagan needs none of the operators. This function declares them and imports again.
    """
    try:
        import torch_fidelity
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [module for module in sys.modules if module.split(".")[0] in ("torchvision", "torch_fidelity")]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou) -> Tensor")
        import torch_fidelity  # noqa: F401
