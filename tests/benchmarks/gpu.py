"""Training on one GPU: images/s, memory and host time: `python -m tests.benchmarks.gpu [--json FILE] [--table FILE]`.

The official SAGAN at 128 px, with attention at 32×32 and at 64×64, for several batches, in bf16 and in float32 (with
TF32 in convolutions), with the step as a CUDA graph and without. Several GPUs have no graph. Every row is written to
both files as soon as it is measured, so that a run that is cut keeps what it has. `host_ms` is the time until a step is
queued: where it is not below the time of the step, Python is the limit.

Needs a CUDA device, torch, numpy and safetensors alone.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pipeline.compute.devices import configure_device
from sagan import ModelConfig, OptimConfig, Step, TrainState
from sagan.cost import step_flop_per_image

WARM_UP, STEPS = 4, 10


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
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {date.today()}"
    print(title, flush=True)
    rows: list[dict[str, Any]] = []
    cases = [
        (attention, batch, precision, graph)
        for attention in (32, 64)
        for precision in ("bf16", "float32")
        for batch in sorted(arguments.batch, reverse=True)
        for graph in (True, False)
    ]
    for case in cases:
        try:
            row: dict[str, Any] = measure(*case)
        except RuntimeError as error:  # out of memory
            row = {"error": str(error).splitlines()[0][:200]}
        names = ("attention", "batch", "precision", "graph")
        rows.append({**dict(zip(names, case, strict=True)), **row})
        print(json.dumps(rows[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1))
        if arguments.table:
            arguments.table.write_text(f"{title}\n\n{table(rows)}\n")
        torch.cuda.empty_cache()


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    names = list(rows[0])
    cells = [names, ["---"] * len(names), *([str(row.get(name, "–")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def measure(attention: int, batch: int, precision: str, graph: bool) -> dict[str, float]:
    """Return the figures of one configuration."""
    torch.cuda.reset_peak_memory_stats()
    config = ModelConfig(resolution=128, num_classes=1000, attention=(attention,))
    state = TrainState(config, OptimConfig(), seed=0, device="cuda")
    step = Step(state, batch, precision=precision)
    step.graph = step.graph if graph else None
    images = torch.rand(batch, 3, 128, 128, device="cuda") * 2 - 1
    labels = torch.arange(batch, device="cuda") % 1000
    began = time.perf_counter()
    for _ in range(WARM_UP):
        step([(images, labels)])
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - began
    host, began = 0.0, time.perf_counter()
    for _ in range(STEPS):
        before = time.perf_counter()
        metrics = step([(images, labels)])
        host += time.perf_counter() - before
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / STEPS
    assert metrics.isfinite().all()
    return {
        "images_per_s": round(batch / seconds, 1),
        "step_ms": round(1e3 * seconds, 1),
        "host_ms": round(1e3 * host / STEPS, 1),
        "tflop_per_s": round(batch / seconds * step_flop_per_image(config) / 1e12, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "warm_up_s": round(warm_up, 1),
    }


if __name__ == "__main__":
    main()
