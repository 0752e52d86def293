"""What our layers save over their plain forms, forward and backward: `python -m tests.benchmarks.layers [--json FILE]`.

Every resampling convolution of SAGAN at 128 px, and image statistics (forward only), in float32 and, where the machine
has it, in bfloat16. Both forms run in turn, A B A B …, on the same inputs, after their results were found equal; the
figure is the median of the ratios pair by pair (plain / ours), so that a machine whose speed drifts does not decide it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from pipeline.compute.torch_settings import configure_device
from sagan import ModelConfig
from sagan.batch_norm import image_statistics
from sagan.resample import conv_down, up_conv
from tests.benchmarks.step import has_bf16, timed

PAIRS = 9
MODEL = ModelConfig(resolution=128, num_classes=1000)

Layer = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, help="images of the generator's batch; default: 8, on CUDA 256")
    parser.add_argument("--json", type=Path, help="write the ratios as one object")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        configure_device(torch.device(device))
    batch = arguments.batch or (256 if device == "cuda" else 8)
    types = [torch.float32, *([torch.bfloat16] if device == "cuda" or has_bf16() else [])]
    table = Table(title=f"plain / ours, {device}, {torch.get_num_threads()} threads, batch {batch}, channels-last")
    for column in ("layer", *(str(dtype).removeprefix("torch.") for dtype in types)):
        table.add_column(column, justify="right")
    ratios = {}
    for pair in layers(batch, device):
        row = []
        for dtype in types:
            ratio = pair.compare(dtype, device)
            ratios[f"{pair.name}_{str(dtype).removeprefix('torch.')}_speedup".replace(" ", "_")] = round(ratio, 3)
            row.append(f"{ratio:.2f}")
        table.add_row(pair.name, *row)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(ratios, indent=1))


@dataclass(frozen=True)
class Pair:
    """A layer in both forms, each with its weight as it keeps it."""

    name: str
    ours: Layer
    plain: Layer
    x: Tensor
    our_weight: Tensor
    weight: Tensor

    def compare(self, dtype: torch.dtype, device: str) -> float:
        """Median of plain / ours over interleaved pairs, after a warm-up in which both results must agree."""
        x, our_weight, weight = (last(tensor.to(dtype)) for tensor in (self.x, self.our_weight, self.weight))
        expected = self.plain(x, weight)
        difference = (self.ours(x, our_weight) - expected).norm() / expected.norm()
        exact = 1e-4 if device == "cpu" else 2e-3  # on CUDA, convolutions have the ten bits of TF32
        bound = exact if dtype == torch.float32 else 2e-2  # bfloat16 has eight bits
        if not difference < bound:
            raise SystemExit(f"{self.name}: the forms differ by {difference:.1e}: nothing was timed")
        direction = torch.ones_like(expected)

        def seconds(layer: Layer, weight: Tensor) -> float:
            inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
            return timed(lambda: layer(*inputs).backward(direction), device)

        ratios = [seconds(self.plain, weight) / seconds(self.ours, our_weight) for _ in range(PAIRS + 1)]
        return statistics.median(ratios[1:])


def layers(batch: int, device: str) -> Iterator[Pair]:
    size = 4
    for in_, out in pairwise(MODEL.widths_g):
        x, weight = torch.randn(batch, in_, size, size, device=device), torch.randn(out, in_, 3, 3, device=device)
        kept = weight.flip(2, 3).transpose(0, 1)
        yield Pair(f"up {in_} to {out} at {size}", lambda x, w: up_conv(x, w, None), _plain_up, x, kept, weight)
        size *= 2
    for out, down in MODEL.widths_d:
        if down:  # real and fake images together
            x = torch.randn(2 * batch, out, size, size, device=device)
            weight = torch.randn(out, out, 3, 3, device=device)
            yield Pair(f"down {out} at {size}", lambda x, w: conv_down(x, w, None), _plain_down, x, weight, weight)
            size //= 2
    x, unused = torch.randn(batch, 128, 64, 64, device=device), torch.zeros(1, 1, 1, 1, device=device)
    yield Pair("image statistics 128 at 64", _our_statistics, _plain_statistics, x, unused, unused)


def _plain_up(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2), weight, padding=1)


def _plain_down(x: Tensor, weight: Tensor) -> Tensor:
    return F.avg_pool2d(F.conv2d(x, weight, padding=1), 2)


def _our_statistics(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat(image_statistics(x.detach())) + weight.sum()


def _plain_statistics(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat(torch.var_mean(x.detach().float(), dim=(2, 3), correction=0)[::-1]) + weight.sum()


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
