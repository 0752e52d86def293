"""Training on one GPU: images/s, memory and host time: `python -m tests.benchmarks.gpu [--json FILE] [--table FILE]`.

The official SAGAN at 128 px, with attention at 32×32 and at 64×64, for several batches, in bf16 and in float32 (with
TF32 in convolutions), with the step as a CUDA graph and without. `of_peak` is the share of the rate of a large bf16
matrix product, with the nominal floating-point operations of a step. `host_ms` is the time until a step is queued:
where it is not below the time of the step, Python is the limit. Two more figures follow: the time of the kernels of one
step by class, and the images/s that the machine's cores decode, which must exceed what a step takes.

Both files are written again after each measurement, so that a run that is cut keeps what it has. Needs a CUDA device,
torch, numpy and safetensors alone; decoding needs simplejpeg and is left out without it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.compute.torch_settings import configure_device
from sagan import ModelConfig, OptimConfig, Step, TrainState
from sagan.cost import step_flop_per_image
from sagan.step_graph import WARM_UP

STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--json", type=Path, help="write the rows as one list")
    parser.add_argument("--table", type=Path, help="write the rows as a Markdown table")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    device = torch.device("cuda")
    configure_device(device)
    report = Report(arguments.json, arguments.table)
    report.add("title", f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    report.add("date", str(date.today()))
    report.add("peak_tflop_per_s", round(bf16_peak(), 1))
    report.add("decoded_images_per_s", decoding_rate())
    report.add("kernel_ms_by_class", kernel_times(attention=64, batch=256))
    cases = [
        (attention, batch, precision, graph)
        for precision in ("bf16", "float32")
        for attention in (32, 64)
        for batch in sorted(arguments.batch, reverse=True)
        for graph in (True, False)
    ]
    for case in cases:
        names = ("attention", "batch", "precision", "graph")
        row: dict[str, Any] = dict(zip(names, case, strict=True))
        try:
            row.update(measure(*case))
            row["of_peak"] = round(row["tflop_per_s"] / report.values["peak_tflop_per_s"], 2)
        except torch.OutOfMemoryError as error:
            row["error"] = str(error).splitlines()[0][:200]
        report.add_row(row)
        torch.cuda.empty_cache()


class Report:
    """What was measured so far, on the terminal and in both files.

    Attributes:
        values: the figures by name; `rows` is the list of rows.
    """

    def __init__(self, json_file: Path | None, table_file: Path | None) -> None:
        self.values: dict[str, Any] = {"rows": []}
        self._json, self._table = json_file, table_file

    def add(self, name: str, value: Any) -> None:
        """Note one figure."""
        self.values[name] = value
        self._write(f"{name}: {value}")

    def add_row(self, row: dict[str, Any]) -> None:
        """Note the figures of one configuration."""
        self.values["rows"].append(row)
        self._write(json.dumps(row))

    def _write(self, line: str) -> None:
        print(line, flush=True)
        if self._json:
            self._json.write_text(json.dumps(self.values, indent=1))
        if self._table:
            figures = [f"- {name}: {value}" for name, value in self.values.items() if name != "rows"]
            self._table.write_text("\n".join([*figures, "", table(self.values["rows"]), ""]))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, ["---"] * len(names), *([str(row.get(name, "–")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def bf16_peak(side: int = 8192, products: int = 20) -> float:
    """Return the TFLOP/s of products of two random bf16 matrices with `side` rows and columns."""
    left, right = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(products):
        left @ right
    torch.cuda.synchronize()
    return 2 * side**3 * products / (time.perf_counter() - began) / 1e12


def decoding_rate(images: int = 20_000) -> float | None:
    """Return the images/s that all cores decode: JPEG at 128 px of smooth noise, about 7 KB each."""
    try:
        import simplejpeg
    except ImportError:
        return None
    coarse = torch.rand(64, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(coarse, size=128, mode="bicubic").clamp(0, 1).mul(255).byte()
    files = [simplejpeg.encode_jpeg(image.permute(1, 2, 0).contiguous().numpy(), quality=95) for image in pixels]
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as threads:
        began = time.perf_counter()
        list(threads.map(lambda n: [simplejpeg.decode_jpeg(data) for data in files], range(images // len(files))))
        return round(images // len(files) * len(files) / (time.perf_counter() - began))


KERNEL_CLASSES = {
    "batch norm, biases and resampling": (
        "_image_statistics",
        "_rectified_affine",
        "_gradient_sums",
        "_affine_of_two",
        "_add_bias",
        "_bias_gradient",
        "_box",
        "_upsample",
        "_sums_of_four",
    ),
    "attention": ("flash", "fmha"),
    "convolution and matrix product": (
        "conv",
        "gemm",
        "nvjet",
        "xmma",
        "cutlass",
        "dgrad",
        "wgrad",
        "fprop",
        "sm90",
        "gemv",
    ),
    "optimiser and average": ("multi_tensor",),
    "copy and layout": ("copy", "memcpy", "memset", "nchw", "nhwc", "transpose", "cat"),
    "sum": ("reduce",),
    "element by element": ("elementwise", "pool"),
}
"""Words in the names of kernels by class. The first class with such a word has the kernel."""


def kernel_times(attention: int, batch: int) -> dict[str, float]:
    """Return the ms that the kernels of each class take in one step in bf16, the largest first."""
    step, real = prepared(attention, batch, "bf16", graph=False)
    for _ in range(WARM_UP + 1):
        step([real])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step([real])
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profile.key_averages():
        name = event.key.lower()
        kinds = [kind for kind, words in KERNEL_CLASSES.items() if any(word in name for word in words)]
        times[kinds[0] if kinds else "other"] += event.self_device_time_total / 1e3
    return {kind: round(milliseconds, 2) for kind, milliseconds in times.most_common()}


def prepared(attention: int, batch: int, precision: str, graph: bool) -> tuple[Step, tuple[Tensor, Tensor]]:
    """Return a step of a new state, and a batch of real images with labels."""
    config = ModelConfig(resolution=128, num_classes=1000, attention=(attention,))
    step = Step(TrainState(config, OptimConfig(), seed=0, device="cuda"), batch, precision=precision)
    step.graph = step.graph if graph else None
    images = torch.rand(batch, 3, 128, 128, device="cuda") * 2 - 1
    return step, (images, torch.arange(batch, device="cuda") % 1000)


def measure(attention: int, batch: int, precision: str, graph: bool) -> dict[str, float]:
    """Return the figures of one configuration."""
    torch.cuda.reset_peak_memory_stats()
    step, real = prepared(attention, batch, precision, graph)
    began = time.perf_counter()
    for _ in range(WARM_UP + 1):
        step([real])
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - began
    host, began = 0.0, time.perf_counter()
    for _ in range(STEPS):
        before = time.perf_counter()
        metrics = step([real])
        host += time.perf_counter() - before
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / STEPS
    assert metrics.isfinite().all()
    return {
        "images_per_s": round(batch / seconds, 1),
        "step_ms": round(1e3 * seconds, 1),
        "host_ms": round(1e3 * host / STEPS, 1),
        "tflop_per_s": round(batch / seconds * step_flop_per_image(step.state.model) / 1e12, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "warm_up_s": round(warm_up, 1),
    }


if __name__ == "__main__":
    main()
