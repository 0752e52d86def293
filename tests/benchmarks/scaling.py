"""What training together costs: `python -m tests.benchmarks.scaling [--json FILE]`.

Two gloo ranks, one thread each, that train one model (batch norm over both, DDP, u from rank 0) over two processes that
train a model each at the same time. SAGAN at 32 px, 8.5 M / 9.5 M parameters, float32, at 32 and at 8 images per rank.
Both kinds take their steps in turn; the efficiency is the median of the ratios round by round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.compute.torch_settings import ALLOCATOR, configure_device
from sagan import ModelConfig, OptimConfig, Step, TrainState, World
from sagan.cost import parameters
from tests.benchmarks._interleaved import Figures, Server, median_ratio, serve

MODEL = ModelConfig(resolution=32, num_classes=10, multipliers_g=(8, 8, 4, 2), multipliers_d=(2, 4, 8, 8))
RANKS = 2
STEPS = {32: 1, 8: 4}  # images per rank → steps per turn, so that a turn takes about as long


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures as one object")
    parser.add_argument("--serve", nargs=3, metavar=("IMAGES", "RANK", "MEETING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        images, rank, meeting = arguments.serve
        train(int(images), int(rank), meeting)
        return
    print(f"{RANKS} ranks of one thread, parameters {parameters(MODEL)}, torch {torch.__version__}", flush=True)
    figures = {f"two_rank_efficiency_b{images}": efficiency(images, arguments.rounds) for images in STEPS}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def efficiency(images: int, rounds: int) -> float:
    """Time of independent processes / time of ranks, for the same number of images each."""
    with tempfile.TemporaryDirectory() as folder:
        kinds = {
            "independent": [start(images, rank, "alone") for rank in range(RANKS)],
            "ranks": [start(images, rank, f"file://{folder}/meeting") for rank in range(RANKS)],
        }
        turns: dict[str, list[Figures]] = {kind: [] for kind in kinds}
        for number in range(rounds + 1):
            for kind, servers in kinds.items():
                seconds = turn(servers)
                if number:  # the first: caches, optimiser states
                    turns[kind].append(seconds)
        for server in (server for servers in kinds.values() for server in servers):
            server.close()
    ratio = round(median_ratio(turns["independent"], turns["ranks"]), 4)
    best = {kind: min(t["seconds"] for t in taken) / STEPS[images] for kind, taken in turns.items()}
    shown = ", ".join(f"{kind} {seconds:.3f} s/step" for kind, seconds in best.items())
    print(f"{images:3} images per rank: efficiency {ratio:.1%} (fastest of {rounds} rounds: {shown})", flush=True)
    return ratio


def turn(servers: list[Server]) -> Figures:
    """All of a kind at once, until the last is done."""
    for server in servers:
        server.ask()
    return {"seconds": max(server.answer()["seconds"] for server in servers)}


def start(images: int, rank: int, meeting: str) -> Server:
    environment = ALLOCATOR["cpu"] | {"OMP_NUM_THREADS": "1"}
    return Server("tests.benchmarks.scaling", ["--serve", str(images), str(rank), meeting], environment)


def train(images: int, rank: int, meeting: str) -> None:
    """One process: `meeting` is where the ranks of a process group find each other, or "alone"."""
    configure_device(torch.device("cpu"))
    if meeting != "alone":
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    world = World.current()
    step = Step(TrainState(MODEL, OptimConfig(), seed=0), images * world.size, world)
    real, y = torch.rand(images, 3, 32, 32) * 2 - 1, torch.arange(images) % 10

    def work() -> Figures:
        began = time.perf_counter()
        for _ in range(STEPS[images]):
            step([(real, y)])
        return {"seconds": time.perf_counter() - began}

    serve(work)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
