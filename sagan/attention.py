"""Self-attention over a feature map (Zhang et al. 2019, as in the released code)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagan.spectral_norm import Conv2d


class SelfAttention(nn.Module):
    """y = x + γ · W_o(softmax(θ(x) φ(x)ᵀ) g(x)), keys and values max-pooled 2×2, γ starting at 0.

    θ and φ have C/8 channels, g has C/2; no biases and no 1/√d. C must be divisible by 8, H and W even.
    """

    def __init__(self, channels: int, *, spectral_norm: bool = True) -> None:
        super().__init__()
        if channels % 8:
            raise ValueError(f"self-attention needs a multiple of 8 channels, got {channels}")

        def conv(in_: int, out: int) -> Conv2d:
            return Conv2d(in_, out, 1, bias=False, spectral_norm=spectral_norm)

        self.theta = conv(channels, channels // 8)
        self.phi = conv(channels, channels // 8)
        self.g = conv(channels, channels // 2)
        self.out = conv(channels // 2, channels)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        values = F.max_pool2d(self.g(x), 2).flatten(2)  # [b, C/2, HW/4]
        attended = torch.bmm(values, self.maps(x).to(values.dtype).transpose(1, 2))
        return torch.addcmul(x, self.gamma.to(x.dtype), self.out(attended.view(b, -1, h, w)))

    def maps(self, x: Tensor) -> Tensor:
        """[b, HW, HW/4], float32 at least: how each position attends to the pooled ones; rows sum to one."""
        queries = self.theta(x).flatten(2)
        keys = F.max_pool2d(self.phi(x), 2).flatten(2)
        energy = torch.bmm(queries.transpose(1, 2), keys)
        return energy.softmax(dim=-1, dtype=torch.promote_types(energy.dtype, torch.float32))
