"""What DiffAugment is worth with 500 images: `python -m tests.benchmarks.small_collections [--json FILE]`.

The narrow model of `learning.py` trains on 50 images of each class of CIFAR-10, and of Imagenette at 32 px
(SAGAN_TEST_DATA), with and without `augment="diffaugment"`. Seeds are paired: with one seed, both arms have the same
images, order, latents and initial weights. Differences are to the arm without, with a 95 % interval over the seeds.

distance: Fréchet distance of averaged weights to all training images of the source (5 000 or 1 500), not only to the
    500, in the features of ResNet-56 (2 000 samples).
trained, heldout: mean logits of the discriminator for the 500 images and for images of the source's test set (1 017 or
    250), changed as in training. A discriminator that memorises has a large gap between the two.
positive: share of the held-out images with a logit above 0.

Uses a CUDA device where there is one. Not a benchmark of speed. The default trains on a third more images than that of
`learning.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.collection.manifest import Collection
from pipeline.compute.torch_settings import ALLOCATOR, configure_device
from pipeline.config.schema import DataSection, EvaluateSection, PackSection
from pipeline.evaluation.scorer import open_scorer
from pipeline.packing.pack import pack
from pipeline.streaming.read_images import read_images
from sagan import Model, ModelConfig, OptimConfig, Step, TrainState, diffaugment
from sagan.config import Augmentation
from sagan.random import Purpose
from tests.benchmarks.learning import BATCH, MODEL, OPTIM, half_width, order
from tests.real_data import real_file

IMAGES_OF_A_CLASS = 50
SOURCES = {
    "CIFAR-10": {"train": "cifar10-train-5000.tar", "heldout": "cifar10-test-1017.tar"},
    "Imagenette": {"train": "imagenette128-train-1500.tar", "heldout": "imagenette128-val-250.tar"},
}
ARMS: dict[str, Augmentation | None] = {"without": None, "diffaugment": "diffaugment"}


@dataclass(frozen=True)
class Run:
    """One training: source, arm and seed."""

    source: str
    arm: str
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--kimg", type=float, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write all results as one object")
    arguments = parser.parse_args()
    files = {name: {split: str(real_file(file)) for split, file in of.items()} for name, of in SOURCES.items()}
    network = str(real_file("resnet56-cifar10.ts"))
    os.environ.update(ALLOCATOR["cpu"] | {"OMP_NUM_THREADS": "1"})
    results: dict[Run, dict[str, float]] = {}
    spawn = multiprocessing.get_context("spawn")  # CUDA does not work in a forked process
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(arguments.processes, mp_context=spawn) as pool:
        for name, splits in files.items():
            pack(f"{folder}/{name}", PackSection(source=splits, resolution=32))
        runs = [Run(name, arm, seed) for seed in range(arguments.seeds) for name in SOURCES for arm in ARMS]
        training = {
            pool.submit(train, run, arguments.kimg, arguments.samples, f"{folder}/{run.source}", network): run
            for run in runs
        }
        for done in as_completed(training):
            run = training[done]
            results[run] = done.result()
            print(f"{run.source}, {run.arm}, seed {run.seed}: {results[run]}", flush=True)
    print(table(results))
    if arguments.json:
        shown = [vars(run) | values for run, values in sorted(results.items(), key=lambda item: str(item[0]))]
        arguments.json.write_text(json.dumps({"kimg": arguments.kimg, "runs": shown}, indent=1))


def train(run: Run, kimg: float, samples: int, url: str, network: str) -> dict[str, float]:
    """Return the figures of one training."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configure_device(device)
    collection, augment = Collection.open(url), ARMS[run.arm]
    data = DataSection(train=url)
    images, labels = _read(collection, data, _first_of_each_class(collection), device)
    heldout = _read(collection, data, np.array(collection.ids("heldout")), device)
    state = TrainState(ModelConfig(**MODEL), OptimConfig(**OPTIM), run.seed, device)
    step = Step(state, BATCH, augment=augment)
    while state.images < 1000 * kimg:
        ids = torch.from_numpy(order(run.seed, state.images, len(images))).to(device)
        step([(images[ids], labels[ids])])
    section = EvaluateSection(extractor=network, trust_extractor=True, samples=samples, standing_images=512)
    model = Model.from_state(state, standing_images=section.standing_images)
    with open_scorer(section, collection, data, 0) as scorer:
        score = scorer.score(model, scorer.protocol(model, seed=0, samples=samples))
    trained, unseen = (_logits(state, augment, *batch) for batch in ((images, labels), heldout))
    return {
        "distance": next(value for name, value in score.values.items() if name.startswith("fd_")),
        "trained": trained.mean().item(),
        "heldout": unseen.mean().item(),
        "positive": (unseen > 0).float().mean().item(),
    }


def _first_of_each_class(collection: Collection) -> np.ndarray:
    ids = np.array(collection.ids("train"))
    labels = collection.labels[ids]
    return np.concatenate([ids[labels == label][:IMAGES_OF_A_CLASS] for label in range(collection.num_classes)])


def _read(collection: Collection, data: DataSection, ids: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return images, float32 [n, 3, 32, 32] in [−1, 1], and labels, int64 [n], on `device`."""
    pixels = torch.cat(list(read_images(collection, ids, data.cache, data.cache_gb, 1)))
    return pixels.to(device).float() * (2 / 255) - 1, torch.from_numpy(collection.labels[ids]).to(device)


@torch.no_grad()
def _logits(state: TrainState, augment: Augmentation | None, images: Tensor, labels: Tensor) -> Tensor:
    """Return the discriminator's logits [n] for images that are changed as in training, with fixed random numbers."""
    if augment is not None:
        size = images.shape[-1]
        parameters = diffaugment.draw_parameters(0, Purpose.AUGMENT_REAL, range(len(images)), size)
        images = diffaugment.augment(images, parameters.to(images.device))
    batches = zip(images.split(256), labels.split(256), strict=True)
    return torch.cat([state.discriminator(x, y) for x, y in batches])


def table(results: dict[Run, dict[str, float]]) -> str:
    lines = [f"{'':24}{'distance':>10}{'difference, 95 %':>20}{'trained':>9}{'heldout':>9}{'gap':>7}{'positive':>10}"]
    seeds = sorted({run.seed for run in results})
    for source in SOURCES:
        base = [results[Run(source, "without", seed)] for seed in seeds]
        for arm in ARMS:
            runs = [results[Run(source, arm, seed)] for seed in seeds]
            mean = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
            differences = [run["distance"] - of["distance"] for run, of in zip(runs, base, strict=True)]
            shown = "–" if arm == "without" else f"{statistics.mean(differences):+.2f} ± {half_width(differences):.2f}"
            lines.append(
                f"{f'{source}, {arm}':24}{mean['distance']:>10.2f}{shown:>20}{mean['trained']:>9.2f}"
                f"{mean['heldout']:>9.2f}{mean['trained'] - mean['heldout']:>7.2f}{mean['positive']:>10.2f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
