"""DINOv2's vision transformer (Oquab et al. 2023). `published_networks.py` fills it with the published parameters.

torch-fidelity downloads code from GitHub for this network and runs it. The parameters here have the same names and
shapes as in that code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (width, blocks, heads)
SIZES = {
    "dinov2-vit-s-14": (384, 12, 6),
    "dinov2-vit-b-14": (768, 12, 12),
    "dinov2-vit-l-14": (1024, 24, 16),
    "dinov2-vit-g-14": (1536, 40, 24),
}
PATCH = 14
TRAINED_CELLS = 37  # cells per side of the position table
OFFSET = 0.1  # as in the original, against rounding down; it shifts every position slightly


class DinoV2(nn.Module):
    """Maps normalised images, float [n, 3, 14 a, 14 a], to the class token, [n, width]."""

    def __init__(self, width: int, blocks: int, heads: int, *, gated: bool) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, stride=PATCH)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TRAINED_CELLS**2, width))
        self.blocks = nn.Sequential(*(_Block(width, heads, gated) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).mT], 1)
        return self.norm(self.blocks(tokens + self._positions(patches.shape[-1])))[:, 0]

    def _positions(self, cells: int) -> Tensor:
        """Return the position table, interpolated as in the original: [1, 1 + cells², width]."""
        table = self.pos_embed[:, 1:].mT.unflatten(2, (TRAINED_CELLS, TRAINED_CELLS))
        factor = (cells + OFFSET) / TRAINED_CELLS
        table = F.interpolate(table, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).mT], 1)


def dinov2(name: str) -> DinoV2:
    """Return the untrained network of a name in `SIZES`."""
    return DinoV2(*SIZES[name], gated=name == "dinov2-vit-g-14")


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = _Attention(width, heads), (_Gated if gated else _Perceptron)(width)
        self.ls1, self.ls2 = _Scale(width), _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Gated(nn.Module):
    """SwiGLU. Its hidden width is two thirds of the MLP's, rounded up to a multiple of 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (4 * width * 2 // 3 + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
