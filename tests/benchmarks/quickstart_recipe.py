"""What the settings of the quickstart are worth: `python -m tests.benchmarks.quickstart_recipe [--json FILE]`.

jobs/quickstart.yaml is trained in one process, without Ray: as it is, and with one setting changed at a time. Seeds are
paired: one seed gives every arm the same order of images, labels and, where shapes agree, weights and latents. The
scores are those of the job's end: independent latents, and a classifier that chose no checkpoint.

ratio: Fréchet distance of samples to the training images, as a multiple of that of held-out real images.
accuracy: share of 1 000 samples that the classifier assigns to the requested class.
recall: share of the training images that lie among the samples (Kynkäänniemi et al. 2019); it measures variety.

Differences of log(ratio) are to the job as it is, with a 95 % interval over the seeds, shown as a factor. Uses a CUDA
device where there is one. Not a benchmark of speed: a run takes a few minutes of one CPU core.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.collection.manifest import Collection
from pipeline.compute.torch_settings import ALLOCATOR, configure_device
from pipeline.config.job_file import load_job
from pipeline.config.schema import EvaluateSection, TrainJob
from pipeline.evaluation import metrics
from pipeline.evaluation.features import Generated
from pipeline.evaluation.final_score import ACCURACY_SAMPLES
from pipeline.evaluation.frechet_distance import frechet_distance
from pipeline.evaluation.scorer import Scorer, open_scorer
from pipeline.packing.pack import pack
from pipeline.streaming.read_images import read_images
from sagan import Model, Step, TrainState
from sagan.config import Augmentation
from tests.benchmarks.learning import BATCH, half_width, order

JOB = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"


@dataclass(frozen=True)
class Arm:
    """Settings that differ from the job's."""

    model: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    augment: Augmentation | None = None


AS_IT_IS = "the job"
ARMS = {
    AS_IT_IS: Arm(),
    "spectral norm on both networks": Arm(model={"spectral_norm_g": True}),
    "moving average .995": Arm(optim={"ema_decay": 0.995}),
    "64 latent dimensions": Arm(model={"z_dim": 64}),
    "without attention": Arm(model={"attention": ()}),
    "learning rates fall to zero": Arm(optim={"lr_decay_kimg": (12, 36)}),
    "DiffAugment": Arm(augment="diffaugment"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write all results as one object")
    arguments = parser.parse_args()
    arms = list(dict.fromkeys([AS_IT_IS, *arguments.arms]))
    os.environ.update(ALLOCATOR["cpu"] | {"OMP_NUM_THREADS": "1"})
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in arms}
    spawn = multiprocessing.get_context("spawn")  # CUDA does not work in a forked process
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(arguments.processes, mp_context=spawn) as pool:
        job = _job(folder)
        assert job.data.pack is not None
        pack(folder, job.data.pack)
        runs = {
            pool.submit(train, folder, name, seed): (name, seed) for seed in range(arguments.seeds) for name in arms
        }
        for done in as_completed(runs):
            name, seed = runs[done]
            results[name][seed] = done.result()
            print(f"{name}, seed {seed}: {results[name][seed]}", flush=True)
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def train(url: str, name: str, seed: int) -> dict[str, float]:
    """Return the figures of one training."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configure_device(device)
    job, arm, collection = _job(url), ARMS[name], Collection.open(url)
    ids = np.array(collection.ids("train"))
    pixels = torch.cat(list(read_images(collection, ids, job.data.cache, job.data.cache_gb, 1))).to(device)
    labels = torch.from_numpy(collection.labels[ids]).to(device)
    shape: dict[str, Any] = {"resolution": collection.resolution, "num_classes": collection.num_classes}
    state = TrainState(replace(job.model, **shape, **arm.model), replace(job.optim, **arm.optim), seed, device)
    step = Step(state, BATCH, augment=arm.augment or job.data.augment)
    while state.images < 1000 * job.train.kimg:
        batch = torch.from_numpy(order(seed, state.images, len(ids))).to(device)
        step([(pixels[batch].float() * (2 / 255) - 1, labels[batch])])
    section = job.evaluate.model_copy(update={"feature_metrics": True})
    with open_scorer(section, collection, job.data, section.seed + 1) as scorer:
        return _figures(Model.from_state(state, standing_images=section.standing_images), scorer, section)


def _job(url: str) -> TrainJob:
    job = load_job(JOB, {"data.train": url})
    assert isinstance(job, TrainJob)
    return job


def _figures(model: Model, scorer: Scorer, section: EvaluateSection) -> dict[str, float]:
    seed = section.seed + 1
    samples = scorer.collection.size(section.split)
    values = scorer.score(model, scorer.protocol(model, seed=seed, samples=samples, repeats=section.repeats)).values
    generated = scorer.features(Generated(model, seed, range(ACCURACY_SAMPLES)), "samples")
    real = frechet_distance(scorer.reference("heldout").moments, scorer.reference(section.split).moments)
    return {
        "ratio": values["fd_classifier"] / real,
        "accuracy": metrics.class_accuracy(generated.logits, generated.labels),
        "recall": values["recall"],
    }


def table(results: dict[str, dict[int, dict[str, float]]]) -> str:
    lines = [f"{'':34}{'ratio':>8}{'worst':>8}{'factor, 95 %':>22}{'accuracy':>10}{'recall':>8}"]
    for name, runs in results.items():
        pairs = [(runs[seed], results[AS_IT_IS][seed]) for seed in sorted(runs)]
        ratios = [run["ratio"] for run, _ in pairs]
        logs = [math.log(run["ratio"] / base["ratio"]) for run, base in pairs]
        middle, half = statistics.mean(logs), half_width(logs)
        factor = f"{math.exp(middle):.2f} ({math.exp(middle - half):.2f} to {math.exp(middle + half):.2f})"
        lines.append(
            f"{name:34}{statistics.median(ratios):>8.2f}{max(ratios):>8.2f}{'–' if name == AS_IT_IS else factor:>22}"
            f"{min(run['accuracy'] for run, _ in pairs):>10.3f}{statistics.mean(r['recall'] for r, _ in pairs):>8.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
