"""torch-fidelity's networks by name, filled with weights that were read elsewhere, and its import."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.evaluation.dinov2 import dinov2

Resize = Literal["fidelity", "clean"]

# Mean and deviation of each channel, of values 0 … 255
INCEPTION = (128.0, 128.0, 128.0), (128.0, 128.0, 128.0)
IMAGENET = (255 * 0.485, 255 * 0.456, 255 * 0.406), (255 * 0.229, 255 * 0.224, 255 * 0.225)
CLIP = (255 * 0.48145466, 255 * 0.4578275, 255 * 0.40821073), (255 * 0.26862954, 255 * 0.26130258, 255 * 0.27577711)


@dataclass(frozen=True)
class Published:
    """The file that a network's name stands for."""

    url: str
    digest: str | None
    """How its SHA-256 begins; None where that is not known (DINOv2)."""


def names() -> list[str]:
    """Of every network here."""
    import_torch_fidelity()
    from torch_fidelity.feature_extractor_clip import MODEL_URLS

    return [*FILES, *MODEL_URLS]


def published(name: str) -> Published | None:
    """None for what is no network of torch-fidelity."""
    if not name.startswith("clip-"):
        return FILES.get(name)
    import_torch_fidelity()
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

    return Published(MODEL_URLS[name], MODEL_METADATA[name]["hash"]) if name in MODEL_URLS else None


FILES = {
    "inception": Published(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
    "vgg16": Published("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    **{
        f"dinov2-vit-{size}-14": Published(
            f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{size}14/dinov2_vit{size}14_pretrain.pth", None
        )
        for size in "sblg"
    },
}


class Network(nn.Module):
    """`network(images)`: uint8 [n, 3, H, W] → (features [n, D], logits [n, K], K = 0 without a head).

    Images are resized to `side` pixels, normalised and given to `body`; `head` makes logits of features. Everything is
    in the dtype that `to` sets. torch-fidelity's own `forward` knows float32 alone (0.4.0 takes float64 for it), so
    only its layers are used.
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
    """The network of a name in `names()`, float32, from the bytes of its weights file.

    Files are state dicts, read without running code; CLIP's are OpenAI's TorchScript archives, of which only the
    parameters are taken. Raises whatever torch raises where the content is something else.
    """
    import_torch_fidelity()
    if name.startswith("clip-"):
        body = _clip(torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict())
        return Network(body, body.input_resolution, *CLIP, resize=resize)
    weights = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    if name == "inception":
        body, head = _inception(weights)
        return Network(body, 299, *INCEPTION, head, resize=resize)
    return Network(_vgg16(weights) if name == "vgg16" else _dinov2(name, weights), 224, *IMAGENET, resize=resize)


def _inception(weights: dict[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    """2 048 features, and what makes 1 008 unbiased logits of them."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    *layers, head = _filled(FeatureExtractorInceptionV3, "inception-v3-compat", "2048", weights).children()
    head.bias = None
    return nn.Sequential(*layers, nn.Flatten()), head


def _vgg16(weights: dict[str, Tensor]) -> nn.Module:
    """4 096 features: the last hidden layer."""
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

    return nn.Sequential(_filled(FeatureExtractorVGG16, "vgg16", "fc2_relu", weights).model, nn.ReLU())


def _clip(weights: dict[str, Tensor]) -> Any:
    """The embedding that is compared with those of texts, 512 to 1 024 features."""
    from torch_fidelity.feature_extractor_clip import build_model

    return build_model(dict(weights), torch.float32).visual


def _dinov2(name: str, weights: dict[str, Tensor]) -> nn.Module:
    """The class token, 384 to 1 536 features."""
    body = dinov2(name)
    body.load_state_dict({key: tensor for key, tensor in weights.items() if key != "mask_token"})  # for training only
    return body


def _filled(network: type[nn.Module], name: str, features: str, weights: dict[str, Tensor]) -> Any:
    """torch-fidelity unpickles the file it is given, so it gets one that holds our tensors and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, f"{folder}/weights.pth")
        return network(name, [features], feature_extractor_weights_path=f"{folder}/weights.pth")


# --- resizing --------------------------------------------------------------------------------------------------------


def _as_tensorflow_1(images: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Bilinear, not antialiased: that of the network which the first FIDs were computed with."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return interpolate_bilinear_2d_like_tensorflow1x(images.to(dtype), size=(side, side), align_corners=False)


def _clean(images: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Bicubic, antialiased, not rounded, clipped to 0 … 255: Pillow's on float channels, as clean-fid has it.

    Parmar et al. 2022. Computed in float64, where it is within 1e-4 of Pillow's.
    """
    resized = F.interpolate(images.to(torch.float64), (side, side), mode="bicubic", antialias=True)
    return resized.clamp(0, 255).to(dtype)


_RESIZES: dict[str, tuple[str, Callable[[Tensor, int, torch.dtype], Tensor]]] = {
    "fidelity": ("tf1-bilinear", _as_tensorflow_1),
    "clean": ("clean-bicubic", _clean),
}


# --- import ----------------------------------------------------------------------------------------------------------


def import_torch_fidelity() -> None:
    """Make `import torch_fidelity` work; afterwards its modules are imported as usual.

    It imports torchvision, whose PyPI build does not load its operators beside a CPU build of torch and then fails on
    registering them. None of them is needed here, so they are declared and the import is made once more.
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
