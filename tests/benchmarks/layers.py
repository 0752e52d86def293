"""What our layers save over their plain forms, forward and backward: `python -m tests.benchmarks.layers [--json FILE]`.

Both forms run in turn, A B A B …, on the same inputs, after their results were found equal; the figure is the median of
the ratios pair by pair (plain / ours), so that a machine whose speed drifts does not decide it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from sagan.batch_norm import image_statistics
from sagan.resample import conv_down, up_conv

PAIRS = 15
# channels, size of the smaller map, images: the quickstart's widest layers, and ones of 128 px
SHAPES = [(64, 8, 16), (32, 16, 16), (256, 16, 8), (128, 32, 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the ratios as one object")
    arguments = parser.parse_args()
    table = Table(title=f"plain / ours, {torch.get_num_threads()} threads, float32, channels-last")
    for column in ("layer", "channels", "size", "images", "ratio"):
        table.add_column(column, justify="right")
    ratios = {}
    for channels, size, images in SHAPES:
        for name, ours, plain, side in LAYERS:
            x = torch.randn(images, channels, side * size, side * size).contiguous(memory_format=torch.channels_last)
            weight = torch.randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
            ratio = compare(ours, plain, x, weight)
            ratios[f"{name}_{channels}x{size}x{images}_speedup"] = round(ratio, 3)
            table.add_row(name, str(channels), str(size), str(images), f"{ratio:.2f}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(ratios, indent=1))


Layer = Callable[[Tensor, Tensor], Tensor]

LAYERS: list[tuple[str, Layer, Layer, int]] = [
    (
        "up_conv",
        lambda x, w: up_conv(x, w, None),
        lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2), w, padding=1),
        1,
    ),
    (
        "conv_down",
        lambda x, w: conv_down(x, w, None),
        lambda x, w: F.avg_pool2d(F.conv2d(x, w, padding=1), 2),
        2,
    ),
    (
        "image_statistics",
        lambda x, _: torch.cat(image_statistics(x)),
        lambda x, _: torch.cat(torch.var_mean(x, dim=(2, 3), correction=0)[::-1]),
        2,
    ),
]


def compare(ours: Layer, plain: Layer, x: Tensor, weight: Tensor) -> float:
    """Median of plain / ours over interleaved pairs, after a warm-up in which both results must agree."""
    torch.testing.assert_close(ours(x, weight), plain(x, weight), rtol=1e-3, atol=1e-3)
    seconds(ours, x, weight)
    seconds(plain, x, weight)
    return statistics.median(seconds(plain, x, weight) / seconds(ours, x, weight) for _ in range(PAIRS))


def seconds(layer: Layer, x: Tensor, weight: Tensor) -> float:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    began = time.perf_counter()
    result = layer(x, weight)
    result.backward(torch.ones_like(result))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
