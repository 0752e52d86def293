"""Scores against torch-fidelity: `python -m tests.benchmarks.evaluation [--json FILE]`.

First parity, on the same float64 features of CIFAR-10 images under resnet56-cifar10 (SAGAN_TEST_DATA): FID to 1e-6 of
the traces, IS and KID to 1e-6, precision and recall exactly; and a whole score, features included, beside the whole
one of torch-fidelity. Then speed: FID, IS, KID, precision and recall of 5 000 images in memory (a generator's would be)
against 5 000 PNG images that are packed for us and in folders for torch-fidelity, nothing cached, starting up left out:
torch-fidelity with all cores, ours with a one-thread worker per core; then features alone with one worker and with two.
Turn by turn, medians of the ratios turn by turn, which hold on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from pipeline.collection.manifest import Collection
from pipeline.compute.cluster import connect
from pipeline.config.schema import DataSection, EvaluateSection, PackSection
from pipeline.evaluation import metrics
from pipeline.evaluation.extractors.published_networks import import_torch_fidelity
from pipeline.evaluation.features import Real
from pipeline.evaluation.frechet_distance import Moments, frechet_distance
from pipeline.evaluation.scorer import Scorer, open_scorer
from pipeline.packing.pack import pack
from pipeline.streaming.read_images import read_images
from tests.benchmarks._interleaved import Figures, Server, serve
from tests.real_data import real_file

import_torch_fidelity()

import torch_fidelity  # noqa: E402
from torch_fidelity.feature_extractor_base import FeatureExtractorBase  # noqa: E402
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # noqa: E402
from torch_fidelity.metric_isc import isc_features_to_metric  # noqa: E402
from torch_fidelity.metric_kid import kid_features_to_metric  # noqa: E402
from torch_fidelity.metric_prc import prc_features_to_metric  # noqa: E402

TAR, NETWORK, IMAGES = "cifar10-train-5000.tar", "resnet56-cifar10.ts", 5000
CORES = os.cpu_count() or 1
FID, ISC, KID = "frechet_inception_distance", "inception_score_mean", "kernel_inception_distance_mean"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures as one object")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in (TAR, NETWORK):
        real_file(name)
    if given.serve:
        serve_torch_fidelity(given.serve)
        return
    connect(CORES + 1)
    in_both = tuple(metric for metric in metrics.METRICS if metric.name not in ("density", "coverage"))
    with (
        tempfile.TemporaryDirectory(prefix="sagan-evaluation-") as folder,
        patch.object(metrics, "METRICS", in_both),  # torch-fidelity has no others
    ):
        figures = compare(Path(folder), given.rounds)
    for name, value in figures.items():
        print(f"{name:36}{value:12.3g}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


def compare(folder: Path, rounds: int) -> dict[str, float]:
    """All figures."""
    with tarfile.open(real_file(TAR)) as tar:
        tar.extractall(folder, filter="data")
    packed = PackSection(source=str(real_file(TAR)), resolution=32)
    collection = pack(str(folder / "shards"), packed)
    made = changed(collection, folder)
    torch.save(made.images, folder / "made.pt")
    torch.set_num_threads(1)  # of the worker that works alone
    peer = Server("tests.benchmarks.evaluation", ["--serve", str(folder)], {"OMP_NUM_THREADS": str(CORES)})
    with scorer_with(collection, folder, 1) as one, scorer_with(collection, folder, CORES) as all_cores:
        figures = parity(all_cores, made)
        turns = [turn(one, all_cores, peer, made) for _ in range(1 + rounds)][1:]
    peer.close()
    figures |= {name: median(took[name] for took in turns) for name in turns[0]}
    figures["times_torch_fidelity"] = median(took["torch_fidelity_s"] / took["ours_s"] for took in turns)
    figures["times_one_worker"] = median(took["one_worker_s"] / took["workers_s"] for took in turns)
    return figures


def scorer_with(collection: Collection, folder: Path, workers: int) -> AbstractContextManager[Scorer]:
    data = DataSection(train=collection.url, cache=str(folder / "cache"))
    section = EvaluateSection(
        extractor=str(real_file(NETWORK)), trust_extractor=True, workers=workers, feature_metrics=True
    )
    return open_scorer(section, collection, data, 0)


@dataclass(frozen=True)
class Made:
    """Images in memory, as a generator's would be."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, part: range, batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels in self.images[part.start : part.stop].split(batch):
            yield pixels, torch.zeros(len(pixels), dtype=torch.int64)


def changed(collection: Collection, folder: Path) -> Made:
    """The images of a collection, mirrored and a little noisy, so that every score has something to tell."""
    ids = np.asarray(collection.ids("train"))
    images = torch.cat(list(read_images(collection, ids, str(folder / "cache"), 1.0, 1))).flip(3)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return Made((images + 10 * noise).round().clamp(0, 255).byte().contiguous())


# --- the same numbers ------------------------------------------------------------------------------------------------


def parity(scorer: Scorer, made: Made) -> dict[str, float]:
    """How far our metrics are from torch-fidelity's functions on the same float64 features (relative)."""
    real = Real(scorer.collection, np.asarray(scorer.collection.ids("train")), scorer.data)
    a, b = scorer.features(made, "samples", keep=True), scorer.features(real, "real images", keep=True)
    assert a.rows is not None
    assert b.rows is not None
    x, y, logits = a.rows.double(), b.rows.double(), a.logits.double()
    traces = float(a.moments.covariance.trace() + b.moments.covariance.trace())
    ours = frechet_distance(Moments.of(x), Moments.of(y))
    chunked = frechet_distance(a.moments, b.moments)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)[FID]
    isc = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)[ISC]
    kid = kid_features_to_metric(x, y, kid_subsets=100, kid_subset_size=1000, rng_seed=2020, verbose=False)[KID]
    prc = prc_features_to_metric(x, y, prc_neighborhood=3, prc_batch_size=10_000, verbose=False)
    precision, recall = metrics.precision_recall(x, y)
    return {
        "parity_fid_of_traces": abs(ours - theirs) / traces,
        "parity_fid_chunked_of_traces": abs(chunked - theirs) / traces,
        "parity_isc": abs(metrics.inception_score(logits) - isc) / isc,
        "parity_kid": abs(metrics.kernel_distance(x, y) - kid) / kid,
        "parity_precision": abs(precision - prc["precision"]),
        "parity_recall": abs(recall - prc["recall"]),
    }


# --- speed -----------------------------------------------------------------------------------------------------------


def turn(one: Scorer, all_cores: Scorer, peer: Server, made: Made) -> dict[str, float]:
    """Seconds of each, and how far apart the two whole scores are, relative to torch-fidelity's."""
    theirs = peer.go()
    ours, ours_s = timed(lambda: score(all_cores, made))
    _, one_worker_s = timed(lambda: one.features(made, "samples"))
    _, workers_s = timed(lambda: all_cores.features(made, "samples"))
    forget(all_cores)
    _, reference_s = timed(lambda: all_cores.reference("train"))
    seconds = {"torch_fidelity_s": theirs.pop("seconds"), "ours_s": ours_s, "reference_s": reference_s}
    seconds |= {"one_worker_s": one_worker_s, "workers_s": workers_s}
    return seconds | {f"difference_{name}": abs(ours[name] - theirs[name]) / theirs[name] for name in theirs}


def score(scorer: Scorer, made: Made) -> dict[str, float]:
    forget(scorer)
    values = scorer.compute_metrics(scorer.features(made, "samples", keep=True), classes_match=False)
    return {name.partition("_")[0]: value for name, value in values.items()}


def forget(scorer: Scorer) -> None:
    """The reference is not there yet."""
    shutil.rmtree(Path(scorer.collection.url, "evaluation"), ignore_errors=True)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = perf_counter()
    return work(), perf_counter() - began


def serve_torch_fidelity(folder: Path) -> None:
    """Its own whole score, turn by turn, of the same images in memory against the same PNG files."""
    torch_fidelity.register_feature_extractor("resnet56", Resnet56)
    made = Listed(torch.load(folder / "made.pt"))

    def work() -> Figures:
        found, seconds = timed(
            lambda: torch_fidelity.calculate_metrics(
                input1=made,
                input2=str(folder / "train"),
                samples_find_deep=True,
                feature_extractor="resnet56",
                fid=True,
                isc=True,
                kid=True,
                prc=True,
                cuda=False,
                cache=False,
                verbose=False,
            )
        )
        names = {"fd": FID, "isc": ISC, "kid": KID, "precision": "precision", "recall": "recall"}
        return {"seconds": seconds, **{short: float(found[name]) for short, name in names.items()}}

    serve(work)


class Listed(torch.utils.data.Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class Resnet56(FeatureExtractorBase):
    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.network = torch.jit.load(str(real_file(NETWORK)))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(self.get_provided_features_list(), self.network(images), strict=True))
        return tuple(found[name] for name in self.features_list)


if __name__ == "__main__":
    main()
