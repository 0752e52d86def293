"""The shipped jobs on real images, narrow, on two CPU workers and real servers. Needs SAGAN_TEST_DATA."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline.config.load import load
from pipeline.data.index import Collection
from pipeline.data.stream import read_images
from pipeline.evaluation.measure import load_extractor, score_model
from pipeline.evaluation.metrics import precision_recall
from pipeline.storage import files
from sagan import Model, TrainState
from tests.system.driving import JOBS, Driver

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(1800)]


@pytest.fixture
def images(test_data):
    assert test_data is not None, "set SAGAN_TEST_DATA to the folder of real collections"
    return test_data


@pytest.fixture
def place(s3, ray_cluster, tmp_path):
    """(folder of the commands, bucket, environment)."""
    bucket = s3.bucket()
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": bucket, "SAGAN_RUNS": f"{bucket}/runs"}
    return tmp_path, bucket, env | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}


def pack(place, *arguments):
    folder, _, env = place
    environment = {**os.environ, **env, "PYTHONPATH": str(JOBS.parent)}
    command = [sys.executable, "-m", "pipeline", "pack", *map(str, arguments)]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def test_cifar10_learns_in_ten_minutes(place, images):
    """The distance in ResNet-56's features falls by more than half, and samples are not ten pictures repeated."""
    folder, bucket, env = place
    url = f"{bucket}/cifar10"
    sources = [f"train={images / 'cifar10-train-5000.tar'}", f"heldout={images / 'cifar10-test-1017.tar'}"]
    pack(place, *sources, url, "--resolution", 32)
    overrides = {
        "train.workers": 2,
        "train.precision": "float32",
        "train.kimg": 60,
        "train.log_kimg": 0.64,
        "model.channels_g": 16,
        "model.channels_d": 16,
        "optim.lr_d": 1e-3,
        "optim.lr_g": 4e-4,
        "optim.ema_decay": 0.99,
        "optim.ema_start_kimg": 0,
        "checkpoint.kimg": 10,
        "evaluate.kimg": 20,
        "evaluate.extractor": str(images / "resnet56-cifar10.ts"),
        "evaluate.samples": 2000,
        "evaluate.standing_images": 512,
        "evaluate.precision_recall": True,
        "resources.cpus_per_worker": 1,
    }
    run = Driver(folder, env, job=JOBS / "cifar10.yaml", tiny=False, **overrides)
    assert run.end() == 0, run.output
    print(run.output)
    summary = run.summary("cifar10")
    assert summary["score"]["key"] == "fd_resnet56-cifar10"

    job = load(JOBS / "cifar10.yaml", overrides | {"data.train": url})
    collection = Collection.open(url)
    job = job.model_copy(update={"model": job.model.for_collection(collection.resolution, collection.classes)})
    untrained = Model.from_state(TrainState(job.model, job.optim, job.seed), standing_images=512)
    section = job.evaluate
    start = score_model(untrained, section, collection, data=job.data, seed=0, samples=2000, judge_seed=0).value
    record = files.read_json(f"{bucket}/runs/cifar10/scores/{files.name(summary['checkpoint'])}.json")
    recall = record["values"]["recall"]

    extractor = load_extractor(section, collection, job.data, 0)
    real = torch.cat([part for part, *_ in _batches(collection, job, collection.ids("train"))])
    first = [int(np.flatnonzero(collection.labels[: collection.size("train")] == k)[0]) for k in range(10)]
    features = torch.cat([extractor(part)[0] for part in real[:2000].split(250)])
    ten = extractor(real[first])[0].repeat(200, 1)
    _, of_ten = precision_recall(ten, features)
    print(
        f"fd {start:.4g} → {summary['score']['value']:.4g}; recall {recall:.3f}, ten real images repeated {of_ten:.3f}"
    )
    assert summary["score"]["value"] < start / 2
    assert recall > of_ten


def _batches(collection, job, ids):
    for part in read_images(collection, np.array(ids), job.data.cache, job.data.cache_gb, 2):
        yield part if isinstance(part, tuple) else (part,)


def test_imagenet128_trains_scores_registers_and_resumes(place, images):
    """Twenty updates of the real job on Imagenette at 128 px, interrupted on the way."""
    folder, bucket, env = place
    url = f"{bucket}/imagenette"
    sources = [f"train={images / 'imagenette128-train-1500.tar'}", f"heldout={images / 'imagenette128-val-250.tar'}"]
    pack(place, *sources, url)
    overrides = {
        "data.train": url,
        "train.workers": 2,
        "train.precision": "float32",
        "train.batch": 16,
        "train.kimg": 0.32,
        "train.log_kimg": 0.032,
        "model.channels_g": 4,
        "model.channels_d": 8,
        "checkpoint.kimg": 0.128,
        "evaluate.kimg": 0.16,
        "evaluate.extractor": "classifier",
        "evaluate.samples": 64,
        "evaluate.standing_images": 32,
        "evaluate.gpus": 0,
        "resources.cpus_per_worker": 1,
    }
    first = Driver(folder, env, job=JOBS / "imagenet128.yaml", tiny=False, **overrides)
    first.until("checkpoint 0")
    first.signal(signal.SIGINT)
    assert first.end() == 130, first.output
    second = Driver(folder, env, job=JOBS / "imagenet128.yaml", tiny=False, **overrides)
    second.until("resumed from")
    assert second.end() == 0, second.output
    summary = second.summary("imagenet128")
    assert summary["images"] == 320
    assert summary["registered"]["alias"] == "champion"
    version = MlflowClient(env["MLFLOW_TRACKING_URI"]).get_model_version_by_alias("imagenet128", "champion")
    assert version.tags["kimg"]
