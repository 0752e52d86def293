"""What each part of the method is worth when training is short: `python -m tests.benchmarks.learning [--json FILE]`.

A narrow model on 5 000 CIFAR-10 images (SAGAN_TEST_DATA), a fixed number of images, seeds paired: one seed gives every
arm the same order of images, latents and, where shapes agree, weights. The score is the Fréchet distance of averaged
weights in the features of ResNet-56 (fd_resnet56-cifar10, 2 000 samples). Differences are to the full method, with a
95 % interval over the seeds. A short run says who learns quickly, not who ends better: the paper's equal rates are
ahead until they collapse.

What must hold for every seed: trained with true labels, at least twice as many samples are recognised as what they were
asked for as after training with shuffled labels. Not a benchmark of speed; half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.collection.manifest import Collection
from pipeline.compute.torch_settings import ALLOCATOR, configure_device
from pipeline.config.schema import DataSection, EvaluateSection, PackSection
from pipeline.evaluation.scorer import open_scorer
from pipeline.packing.pack import pack
from pipeline.streaming.read_images import read_images
from sagan import Model, ModelConfig, OptimConfig, Step, TrainState
from tests.real_data import real_file

BATCH = 32
MODEL: dict[str, Any] = {
    "resolution": 32,
    "num_classes": 10,
    "z_dim": 64,
    "channels_g": 16,
    "channels_d": 16,
    "multipliers_g": (4, 4, 2, 1),
    "multipliers_d": (1, 2, 4, 4),
}
OPTIM: dict[str, Any] = {"lr_d": 1e-3, "lr_g": 4e-4, "ema_decay": 0.99}
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 %, by number of seeds


@dataclass(frozen=True)
class Arm:
    model: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    shuffled: bool = False


EQUAL = {"lr_d": OPTIM["lr_g"]}
FULL, SHUFFLED = "norm on both, two rates (the method)", "the method, labels shuffled"
ARMS = {
    FULL: Arm(),
    SHUFFLED: Arm(shuffled=True),
    "norm on both, equal rates": Arm(optim=EQUAL),
    "norm on D only, equal rates": Arm(model={"spectral_norm_g": False}, optim=EQUAL),
    "without attention": Arm(model={"attention": ()}),
    "batch norm over groups of 8": Arm(model={"batch_norm_group": 8}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kimg", type=float, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write all results as one object")
    arguments = parser.parse_args()
    images, network = str(real_file("cifar10-train-5000.tar")), str(real_file("resnet56-cifar10.ts"))
    os.environ.update(ALLOCATOR["cpu"] | {"OMP_NUM_THREADS": "1"})
    results: dict[str, list[dict[str, float]]] = {name: [{}] * arguments.seeds for name in ARMS}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(arguments.processes) as pool:
        pack(folder, PackSection(source=images, resolution=32))
        runs = {
            pool.submit(train, name, seed, arguments.kimg, folder, network): (name, seed)
            for seed in range(arguments.seeds)
            for name in ARMS
        }
        for done in as_completed(runs):
            name, seed = runs[done]
            results[name][seed] = done.result()
            print(f"{name}, seed {seed}: {results[name][seed]}", flush=True)
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps({"kimg": arguments.kimg, "results": results}, indent=1))
    ratios = [
        true["class_accuracy"] / shuffled["class_accuracy"]
        for true, shuffled in zip(results[FULL], results[SHUFFLED], strict=True)
    ]
    print("class accuracy, true over shuffled labels:", ", ".join(f"{ratio:.2f}" for ratio in ratios))
    if not all(ratio >= 2 for ratio in ratios):
        sys.exit("labels are not learnt: the ratio is below 2")


def train(name: str, seed: int, kimg: float, url: str, judge: str) -> dict[str, float]:
    """Final score of one arm and seed."""
    configure_device(torch.device("cpu"))
    arm, collection = ARMS[name], Collection.open(url)
    data = DataSection(train=url)
    real = torch.cat(list(read_images(collection, np.array(collection.ids("train")), data.cache, data.cache_gb, 1)))
    labels = torch.from_numpy(np.asarray(collection.labels)).long()
    if arm.shuffled:
        labels = labels[torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))]
    state = TrainState(ModelConfig(**{**MODEL, **arm.model}), OptimConfig(**{**OPTIM, **arm.optim}), seed)
    step = Step(state, BATCH)
    while state.images < 1000 * kimg:
        ids = torch.from_numpy(order(seed, state.images, len(real)))
        step([(real[ids].float() * (2 / 255) - 1, labels[ids])])
    section = EvaluateSection(extractor=judge, trust_extractor=True, samples=2000, standing_images=512)
    model = Model.from_state(state, standing_images=section.standing_images)
    with open_scorer(section, collection, data, 0) as scorer:
        score = scorer.score(model, scorer.protocol(model, seed=0, samples=section.samples))
    gammas = {f"gamma_{k}": p.item() for k, p in _gammas(state)}
    return {**score.values, **gammas}


def order(seed: int, start: int, images: int) -> np.ndarray:
    """Which images stand at positions [start, start + BATCH): every epoch a permutation."""
    positions = np.arange(start, start + BATCH)
    epochs = {e: np.random.default_rng([seed, e]).permutation(images) for e in {int(p) // images for p in positions}}
    return np.array([epochs[int(p) // images][p % images] for p in positions])


def _gammas(state: TrainState) -> list[tuple[str, torch.Tensor]]:
    networks = {"g": state.generator, "d": state.discriminator}
    return [(k, p) for k, n in networks.items() for name, p in n.named_parameters() if name.endswith("gamma")]


def table(results: dict[str, list[dict[str, float]]]) -> str:
    key = next(k for k in results[FULL][0] if k.startswith("fd_"))
    lines = [f"{'':38}{key:>22}{'difference, 95 %':>22}{'class accuracy':>18}"]
    for name, runs in results.items():
        scores = [run[key] for run in runs]
        differences = [run[key] - full[key] for run, full in zip(runs, results[FULL], strict=True)]
        accuracy = statistics.mean(run["class_accuracy"] for run in runs)
        shown = "–" if name == FULL else f"{statistics.mean(differences):+.2f} ± {half_width(differences):.2f}"
        lines.append(f"{name:38}{statistics.mean(scores):>22.2f}{shown:>22}{accuracy:>18.3f}")
    return "\n".join(lines)


def half_width(values: list[float]) -> float:
    """Half of the 95 % interval of a mean."""
    if len(values) not in STUDENT_T:
        return math.nan
    return STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


if __name__ == "__main__":
    main()
