"""What a warm start is worth on other classes: `python -m tests.benchmarks.finetuning [--json FILE]`.

For each seed, a narrow model is trained on ten classes of CIFAR-10 (5 000 images). Then two models are trained on five
other classes, of Imagenette at 32 px (about 750 images of SAGAN_TEST_DATA): one from new weights, and one that starts
from both networks and the moving average of the first model. Seeds are paired: both arms of a seed have the same order
of images, latents and labels. The score is the Fréchet distance of averaged weights in the features of ResNet-56
(fd_resnet56-cifar10) at half the length and at the end.

What is looked for: the warm start at half the length is at least as good as the run from new weights at its end. The
program prints the difference with a 95 % interval over the seeds, whatever it is. Not a benchmark of speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tarfile
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipeline.collection.manifest import Collection
from pipeline.compute.torch_settings import ALLOCATOR, configure_device
from pipeline.config.schema import DataSection, EvaluateSection, PackSection
from pipeline.evaluation.scorer import open_scorer
from pipeline.packing.pack import pack
from pipeline.streaming.read_images import read_images
from sagan import Model, ModelConfig, OptimConfig, Step, TrainState
from sagan.warm_start import Choice, Source, WarmStart, tensors_of
from tests.benchmarks.learning import BATCH, MODEL, OPTIM, half_width, order
from tests.real_data import real_file

CLASSES = 5
NEW, WARM = "new weights", "warm start"
Scores = dict[str, list[float]]  # by arm: at half the length, and at the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source-kimg", type=float, default=32, help="length of the training on ten classes")
    parser.add_argument("--kimg", type=float, default=16, help="length of the training on five other classes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write all results as one object")
    arguments = parser.parse_args()
    cifar, imagenette = str(real_file("cifar10-train-5000.tar")), real_file("imagenette128-train-1500.tar")
    network = str(real_file("resnet56-cifar10.ts"))
    os.environ.update(ALLOCATOR["cpu"] | {"OMP_NUM_THREADS": "1"})
    results: dict[int, Scores] = {}
    with tempfile.TemporaryDirectory() as temp, ProcessPoolExecutor(arguments.processes) as pool:
        ten, five = Path(temp) / "ten", Path(temp) / "five"
        pack(str(ten), PackSection(source=cifar, resolution=32))
        _extract(imagenette, Path(temp) / "images")
        pack(str(five), PackSection(source=str(Path(temp) / "images"), resolution=32))
        lengths = (arguments.source_kimg, arguments.kimg)
        runs = {
            pool.submit(compare, seed, str(ten), str(five), network, *lengths): seed for seed in range(arguments.seeds)
        }
        for done in as_completed(runs):
            results[runs[done]] = done.result()
            print(f"seed {runs[done]}: {results[runs[done]]}", flush=True)
    print(table([results[seed] for seed in sorted(results)]))
    if arguments.json:
        values = {"source_kimg": arguments.source_kimg, "kimg": arguments.kimg, "results": results}
        arguments.json.write_text(json.dumps(values, indent=1))


def _extract(tar: Path, folder: Path) -> None:
    """Extract the images of the first classes, a folder each."""
    with tarfile.open(tar) as archive:
        members = [member for member in archive if member.isfile()]
        classes = sorted({member.name.split("/")[-2] for member in members})[:CLASSES]
        for member in members:
            name, image = member.name.split("/")[-2:]
            if name in classes and (content := archive.extractfile(member)) is not None:
                (folder / name).mkdir(parents=True, exist_ok=True)
                (folder / name / image).write_bytes(content.read())


def compare(seed: int, ten: str, five: str, network: str, source_kimg: float, kimg: float) -> Scores:
    """Return the scores of both arms of a seed."""
    configure_device(torch.device("cpu"))
    model, optim = ModelConfig(**MODEL), OptimConfig(**OPTIM)
    earlier = TrainState(model, optim, seed)
    train(earlier, Collection.open(ten), source_kimg)
    collection, other = Collection.open(five), replace(model, num_classes=CLASSES)
    source = Source(model, Collection.open(ten).class_names, images=earlier.images)
    warm = WarmStart.plan(source, other, optim, collection.class_names, Choice())
    states = {NEW: TrainState(other, optim, seed), WARM: warm.state(tensors_of(earlier), seed)}
    scores: Scores = {name: [] for name in states}
    for name, state in states.items():
        for length in (kimg / 2, kimg):
            train(state, collection, length)
            scores[name].append(score(state, collection, network))
    return scores


def train(state: TrainState, collection: Collection, kimg: float) -> None:
    """Train a state to a position."""
    data = DataSection(train=collection.url)
    ids = np.array(collection.ids("train"))
    real = torch.cat(list(read_images(collection, ids, data.cache, data.cache_gb, 1)))
    labels = torch.from_numpy(np.asarray(collection.labels)).long()
    step = Step(state, BATCH)
    while state.images < 1000 * kimg:
        batch = torch.from_numpy(order(state.seed, state.images, len(real)))
        step([(real[batch].float() * (2 / 255) - 1, labels[batch])])


def score(state: TrainState, collection: Collection, network: str) -> float:
    """Return the Fréchet distance of a state's averaged weights."""
    section = EvaluateSection(extractor=network, trust_extractor=True, samples=2000, standing_images=512)
    model = Model.from_state(state, standing_images=section.standing_images)
    with open_scorer(section, collection, DataSection(train=collection.url), 0) as scorer:
        values = scorer.score(model, scorer.protocol(model, seed=0, samples=section.samples)).values
    return next(value for name, value in values.items() if name.startswith("fd_"))


def table(results: list[Scores]) -> str:
    """Return the mean scores, and the paired difference that decides."""
    lines = [f"{'':16}{'half':>10}{'end':>10}"]
    for name in (NEW, WARM):
        half, end = (statistics.mean(run[name][i] for run in results) for i in range(2))
        lines.append(f"{name:16}{half:>10.2f}{end:>10.2f}")
    differences = [run[WARM][0] - run[NEW][1] for run in results]
    mean, width = statistics.mean(differences), half_width(differences)
    lines.append(f"{WARM} at half the length, minus {NEW} at the end: {mean:+.2f} ± {width:.2f}; negative is better")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
