"""A training step at 128 px against a fair reference: `python -m tests.benchmarks.step [--json FILE]`.

The official SAGAN (42.1 M / 39.5 M parameters, attention at 32×32). The reference (tests/benchmarks/_plain_sagan.py) is
eager float32, TF32 on CUDA. Each variant is a process of its own, so that allocator settings and peak memory are its
own; they take their steps in turn, round after round, and a figure is the median of the ratios round by round. Images,
logits and gradients are compared first. Shares of a peak use nominal FLOP (149.5 GFLOP per image), whatever a variant
saves; the peak is the best convolution that the same rounds measured, and a reference below half of it is no reference.

Needs torch, numpy and safetensors alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.compute.torch_settings import ALLOCATOR, configure_device
from sagan import ModelConfig, OptimConfig, Step, TrainState, World
from sagan.batch_norm import Groups
from sagan.cost import parameters, step_flop_per_image
from tests.benchmarks import _plain_sagan
from tests.benchmarks._interleaved import Server, median_ratio
from tests.benchmarks._interleaved import serve as answer

MODEL, OPTIM = ModelConfig(resolution=128, num_classes=1000, attention=(32,)), OptimConfig()
LEAST_REFERENCE_SHARE = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", help="default: 8 16, on CUDA 256")
    parser.add_argument("--rounds", type=int, help="default: 5, on CUDA 20")
    parser.add_argument("--json", type=Path, help="write the figures as one object")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.serve:
        serve(arguments.serve, arguments.batch[0], device)
        return
    start("equal", 2, device).close()  # in its own process: children of a large one inherit its peak memory
    print(f"{describe(device)}; parameters {parameters(MODEL)}", flush=True)
    figures: dict[str, float] = {}
    for batch in arguments.batch or ([256] if device == "cuda" else [8, 16]):
        figures |= compare(device, batch, arguments.rounds or (20 if device == "cuda" else 5))
    for name in ("float32_speedup", "bf16_speedup", "reference_peak_share"):
        figures |= {name: min(values)} if (values := _all_of(figures, name)) else {}
    for name in ("peak_memory_ratio", "bf16_peak_memory_ratio"):
        figures |= {name: max(values)} if (values := _all_of(figures, name)) else {}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    if figures["reference_peak_share"] < LEAST_REFERENCE_SHARE:
        sys.exit(f"the reference reaches {figures['reference_peak_share']:.0%} of the machine's peak: no fair one")


def _all_of(figures: dict[str, float], name: str) -> list[float]:
    return [value for key, value in figures.items() if key.startswith(f"{name}_b")]


def describe(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability = "with" if has_bf16() else "without"
    return f"CPU, {threads()} threads, {capability} bfloat16 instructions, torch {torch.__version__}"


def threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# --- what is compared ------------------------------------------------------------------------------------------------


def compare(device: str, batch: int, rounds: int) -> dict[str, float]:
    """Interleaved rounds of all variants; prints the table, returns the figures of this batch."""
    names = ["reference", "float32", "bf16"] if device == "cuda" or has_bf16() else ["reference", "float32"]
    if device == "cpu":
        names.insert(1, "reference, default allocator")
    variants = {name: start(name, batch, device) for name in ("peak", *names)}
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(rounds):
        for name, server in variants.items():
            results[name].append(server.go())
    for server in variants.values():
        server.close()

    nominal = step_flop_per_image(MODEL) * batch / 1e9
    peaks = {kind: max(r[kind] for r in results["peak"]) for kind in results["peak"][0]}
    base = results["reference"]
    print(f"\nbatch {batch}, {rounds} rounds; convolution peak", {k: f"{v:.0f} GFLOP/s" for k, v in peaks.items()})
    head = ("s/step", "images/s", "speedup", "of default", "of peak", "memory GiB", "memory ratio")
    print(f"{'':30}" + "".join(f"{column:>14}" for column in head))
    figures: dict[str, float] = {}
    for name in names:
        rows = results[name]
        seconds = statistics.median(r["seconds"] for r in rows)
        speedup = median_ratio(base, rows)
        default = results["reference, default allocator"]
        of_default = f"{median_ratio(default, rows):.2f}" if default else "–"
        share = nominal / seconds / peaks["bf16" if name == "bf16" and "bf16" in peaks else "float32"]
        memory = rows[-1]["gib"] / base[-1]["gib"]
        cells = (f"{seconds:.3f}", f"{batch / seconds:.1f}", f"{speedup:.2f}", of_default, f"{share:.0%}")
        print(f"{name:30}" + "".join(f"{c:>14}" for c in (*cells, f"{rows[-1]['gib']:.2f}", f"{memory:.2f}")))
        if name == "reference":
            figures[f"reference_peak_share_b{batch}"] = share
        elif name in ("float32", "bf16"):
            figures[f"{name}_speedup_b{batch}"] = speedup
            figures[f"{name}_images_per_s_b{batch}"] = batch / seconds
            prefix = "" if name == "float32" else "bf16_"
            figures[f"{prefix}peak_memory_ratio_b{batch}"] = memory
    if device == "cuda":
        print(kernels(batch))
    return {key: round(value, 4) for key, value in figures.items()}


def start(name: str, batch: int, device: str) -> Server:
    allocator = {} if name == "reference, default allocator" else ALLOCATOR[device]
    arguments = ["--serve", name, "--batch", str(batch)]
    server = Server("tests.benchmarks.step", arguments, allocator | {"OMP_NUM_THREADS": str(threads())})
    server.go()  # the first step: caches, optimiser states
    return server


def serve(name: str, batch: int, device: str) -> None:
    configure_device(torch.device(device))
    if name == "equal":
        check_equal(device)
        run: Callable[[], dict[str, float]] = dict
    else:
        run = peak(device) if name == "peak" else training(name.split(",")[0], batch, device)
    answer(run)


def training(name: str, batch: int, device: str) -> Callable[[], dict[str, float]]:
    real, y = torch.rand(batch, 3, 128, 128, device=device) * 2 - 1, torch.arange(batch, device=device)
    step: Callable[[], Any]
    if name == "reference":
        plain = _plain_sagan.Step(MODEL, OPTIM, device)
        step = lambda: plain(real, y)  # noqa: E731
    else:
        ours = Step(TrainState(MODEL, OPTIM, 0, device), batch, precision=name)
        step = lambda: ours([(real, y)])  # noqa: E731

    def run() -> dict[str, float]:
        seconds = timed(step, device)
        if device == "cuda":
            return {"seconds": seconds, "gib": torch.cuda.max_memory_allocated() / 2**30}
        return {"seconds": seconds, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}

    return run


def timed(work: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak(device: str) -> Callable[[], dict[str, float]]:
    """GFLOP/s of the best of three 3×3 convolutions, channels-last, forward."""
    types = {"float32": torch.float32, "bf16": torch.bfloat16}
    if device == "cpu" and not has_bf16():
        del types["bf16"]
    scale = 32 if device == "cuda" else 1
    shapes = [(64, 128, 8 * scale), (256, 32, 16 * scale), (512, 16, 32 * scale)]

    def rate(dtype: torch.dtype, channels: int, size: int, images: int) -> float:
        last = torch.channels_last
        x = torch.randn(images, channels, size, size, device=device, dtype=dtype).contiguous(memory_format=last)
        w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).contiguous(memory_format=last)
        seconds = min(timed(lambda: F.conv2d(x, w, padding=1), device) for _ in range(4))
        return 2 * 9 * channels**2 * size**2 * images / seconds / 1e9

    return lambda: {kind: max(rate(dtype, *shape) for shape in shapes) for kind, dtype in types.items()}


def kernels(batch: int) -> str:
    """Time on the device by class of kernel, of one bf16 step."""
    step = Step(TrainState(MODEL, OPTIM, 0, "cuda"), batch, precision="bf16")
    pair = torch.rand(batch, 3, 128, 128, device="cuda"), torch.arange(batch, device="cuda")
    step([pair])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step([pair])
        torch.cuda.synchronize()
    classes = {
        "convolution and matrix products": ("conv", "gemm", "cutlass", "xmma", "nvjet", "wgrad", "dgrad", "fprop"),
        "pooling and resampling": ("pool", "upsample"),
        "reductions": ("reduce", "norm", "softmax"),
        "optimiser and average": ("multi_tensor", "foreach", "adam", "lerp"),
        "copies": ("memcpy", "memset", "copy", "nchw", "nhwc", "transpose"),
    }
    times: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        name = event.key.lower()
        kind = next((k for k, words in classes.items() if any(w in name for w in words)), "elementwise and other")
        times[kind] += event.self_device_time_total / 1e3
    total = sum(times.values()) or 1.0
    return "\n".join(f"{k:34}{v:10.2f} ms {v / total:7.1%}" for k, v in sorted(times.items(), key=lambda x: -x[1]))


# --- equal first -----------------------------------------------------------------------------------------------------


def check_equal(device: str) -> None:
    """Images, logits and gradients of ours and of the reference, at full width on two images.

    Float32 agrees but for rectifiers that a rounding error flips: gradients of the generator then differ by up to 1e-2
    (measured on narrow networks, as between permutations of one batch). In float64 the same comparison is a test with a
    bound of 1e-10 (tests/unit/sagan/test_reference.py).
    """
    state, plain = TrainState(MODEL, OPTIM, 0, device), _plain_sagan.Step(MODEL, OPTIM, device)
    pairs = {
        "generator": (state.generator, plain.generator),
        "discriminator": (state.discriminator, plain.discriminator),
    }
    for ours, theirs in pairs.values():
        _plain_sagan.copy_from(ours, theirs)
    z, y = torch.randn(2, MODEL.z_dim, device=device), torch.tensor([3, 5], device=device)
    groups = Groups(range(2), 1, World(), torch.device(device))
    images, expected = state.generator(z, y, groups), plain.generator(z, y)
    require_equal("images", images, expected, 1e-3)
    logits, expected_logits = state.discriminator(images, y), plain.discriminator(expected, y)
    require_equal("logits", logits, expected_logits, 1e-3)
    logits.sum().backward()
    expected_logits.sum().backward()
    for part, (ours, theirs) in pairs.items():
        require_equal(f"gradients of the {part}", *_plain_sagan.gradients(ours, theirs), bound=1e-2)


def require_equal(what: str, ours: Tensor, theirs: Tensor, bound: float) -> None:
    difference = ((ours - theirs).norm() / theirs.norm()).item()
    if not difference < bound * (10 if ours.is_cuda else 1):  # TF32 has ten bits
        sys.exit(f"{what} differ from the reference's by {difference:.1e}: nothing was timed")


if __name__ == "__main__":
    main()
