"""Self-attention over a feature map (Zhang et al. 2019), in the released form and the forms of two paper versions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagan.config import AttentionForm, Spectral
from sagan.spectral_norm import Conv2d


def value_channels(form: AttentionForm, channels: int) -> int:
    """Return the number of channels of the values g(x), where x has `channels` channels."""
    return channels // {"released": 2, "icml": 8, "first": 1}[form]


class SelfAttention(nn.Module):
    """Self-attention layer: y = x + γ · o(softmax(θ(x) φ(x)ᵀ) g(x)).

    γ is learned and starts at 0, so a new layer is the identity. The convolutions have no biases. The dot products are
    not scaled by 1/√d. θ and φ have C/8 channels. `form` decides the rest:

    released: φ and g are max-pooled 2×2, g has C/2 channels, o is a 1×1 convolution (the official code).
    icml: nothing is pooled, g has C/8 channels, o is a 1×1 convolution (the paper, section 3).
    first: nothing is pooled, g has C channels, there is no o (the paper's first version, and most tutorials).

    Args:
        channels: C, the number of channels of x. It must be divisible by 8.
        spectral: how the convolutions are normalised; None for plain convolutions.
        form: the form of attention.

    Raises ValueError where `channels` is not divisible by 8.
    """

    def __init__(self, channels: int, spectral: Spectral | None, form: AttentionForm = "released") -> None:
        super().__init__()
        if channels % 8:
            raise ValueError(f"self-attention needs a multiple of 8 channels, got {channels}")

        def conv(in_: int, out: int) -> Conv2d:
            return Conv2d(in_, out, 1, spectral, bias=False)

        values = value_channels(form, channels)
        self.pooled = form == "released"
        self.theta = conv(channels, channels // 8)
        self.phi = conv(channels, channels // 8)
        self.g = conv(channels, values)
        self.out = conv(values, channels) if form != "first" else None
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return y [b, C, H, W] for x [b, C, H, W]."""
        b, _, h, w = x.shape
        values = self._pool(self.g(x)).flatten(2)  # [b, C_g, keys]
        if _attends_blockwise(values):
            attended = _attend_blockwise(*self._queries_and_keys(x), values)
        else:
            attended = torch.bmm(values, self.maps(x).to(values.dtype).transpose(1, 2))
        attended = attended.view(b, -1, h, w)
        return torch.addcmul(x, self.gamma.to(x.dtype), attended if self.out is None else self.out(attended))

    def maps(self, x: Tensor) -> Tensor:
        """Return the attention maps of x: [b, HW, keys], float32 at least.

        Row q holds the weights with which position q attends to each key. Every row sums to one. The keys are the HW
        positions, or HW / 4 pooled positions in the released form.
        """
        queries, keys = self._queries_and_keys(x)
        energy = torch.bmm(queries.transpose(1, 2), keys)
        return energy.softmax(dim=-1, dtype=torch.promote_types(energy.dtype, torch.float32))

    def _queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return θ(x), [b, C/8, HW], and φ(x), [b, C/8, keys]."""
        return self.theta(x).flatten(2), self._pool(self.phi(x)).flatten(2)

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2) if self.pooled else x


def _attends_blockwise(values: Tensor) -> bool:
    """Return whether FlashAttention (Dao 2023) takes these values: bfloat16 on CUDA, with at most 256 channels."""
    return values.device.type == "cuda" and values.dtype == torch.bfloat16 and values.shape[1] <= 256


def _attend_blockwise(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return softmax(queriesᵀ keys) applied to the values, [b, C_g, HW], without storing the maps.

    FlashAttention takes one number of channels for all three, so zeros fill up queries and keys.

    Args:
        queries: [b, C/8, HW].
        keys: [b, C/8, keys].
        values: [b, C_g, keys] with C_g ≥ C/8.
    """
    missing = values.shape[1] - queries.shape[1]
    q, k = (F.pad(x.transpose(1, 2), (0, missing)) for x in (queries, keys))
    v = values.transpose(1, 2)
    attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)
    return attended[:, 0].transpose(1, 2)
