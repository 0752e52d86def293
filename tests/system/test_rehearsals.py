"""The shipped jobs and their variants, narrow, on two CPU workers and real servers.

Two of them learn on real images, from SAGAN_TEST_DATA; of the others two updates are made, on imagenette or digits.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline.collection.manifest import Collection
from pipeline.config.job_file import load_job, parse_overrides
from pipeline.config.schema import PackSection, TrainJob, TuneJob
from pipeline.evaluation.extractors.load_extractor import load_extractor
from pipeline.evaluation.metrics import precision_recall
from pipeline.evaluation.scorer import open_scorer
from pipeline.packing.pack import pack as pack_section
from pipeline.storage import files
from pipeline.streaming.read_images import read_images
from sagan import Model, TrainState
from tests.shipped_jobs import JOBS, shipped
from tests.system.command_process import Driver

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]


@pytest.fixture
def images(test_data):
    assert test_data is not None, "set SAGAN_TEST_DATA to the folder of real collections"
    return test_data


@pytest.fixture(scope="module")
def place(s3, ray_cluster, tmp_path_factory):
    """(folder of the commands, bucket, environment)."""
    folder, bucket = tmp_path_factory.mktemp("rehearsals"), s3.bucket()
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": bucket}
    return folder, bucket, env | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}


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
        "train.kimg": 40,
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
        "evaluate.trust_extractor": True,
        "evaluate.samples": 2000,
        "evaluate.standing_images": 512,
        "evaluate.feature_metrics": True,
        "resources.cpus_per_worker": 1,
    }
    run = Driver(folder, env, job=JOBS / "cifar10.yaml", tiny=False, **overrides)
    assert run.end() == 0, run.output
    print(run.output)
    summary = run.summary("cifar10")
    assert summary["score"]["metric"] == "fd_resnet56-cifar10"

    job = load_job(JOBS / "cifar10.yaml", overrides | {"data.train": url})
    collection = Collection.open(url)
    job = job.model_copy(update={"model": job.model.for_collection(collection.resolution, collection.num_classes)})
    untrained = Model.from_state(TrainState(job.model, job.optim, job.seed), standing_images=512)
    section = job.evaluate
    with open_scorer(section, collection, job.data, 0) as scorer:
        start = scorer.score(untrained, scorer.protocol(untrained, seed=0, samples=2000)).value
    record = files.read_json(f"{bucket}/runs/cifar10/scores/{files.name(summary['checkpoint'])}.json")
    recall = record["score"]["values"]["recall"]

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


# The digits' jobs are run whole elsewhere: test_resume, test_sweep and the quickstart.
SHIPPED = {name: job for name, job in shipped().items() if "quickstart" not in name}
BATCH = 4


@pytest.fixture(scope="module")
def small(place, test_data):
    """URL of a small collection of some resolution: imagenette's validation images, or digits."""
    _, bucket, _ = place
    source = str(test_data / "imagenette128-val-250.tar") if test_data else "digits"

    def packed(resolution):
        return pack_section(f"{bucket}/small{resolution}", PackSection(source=source, resolution=resolution)).url

    return packed


class Thumbnails(torch.nn.Module):
    """Features that cost nothing and need no training: each image at 4x4."""

    def forward(self, images):
        pixels = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        return pixels, pixels[:, :10]


@pytest.fixture(scope="module")
def thumbnails(tmp_path_factory):
    path = tmp_path_factory.mktemp("extractor") / "thumbnails.ts"
    torch.jit.script(Thumbnails()).save(path)
    return str(path)


def narrowed(job, collection, extractor):
    """Overrides that leave two updates of two workers, and the least channels that attention takes."""
    return {
        "data.train": collection,
        "model.channels_g": 4,
        "model.channels_d": 8,
        "model.batch_norm_group": min(job.model.batch_norm_group, BATCH // 2),
        "train.workers": 2,
        "train.batch": BATCH,
        "train.kimg": 2 * job.optim.n_dis * BATCH / 1000,
        "train.max_failures": 0,
        "evaluate.extractor": extractor,
        "evaluate.trust_extractor": True,
        "evaluate.samples": 16,
        "evaluate.standing_images": 8,
        "evaluate.grid": 4,
        "evaluate.gpus": 0,
        "resources.cpus_per_worker": 1,
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_two_updates_of_every_job_and_variant(name, place, small, thumbnails):
    folder, _, env = place
    path, overrides = SHIPPED[name]
    job = load_job(path, parse_overrides(overrides))
    run_name = f"two-updates-{name.replace(' ', '-')}"
    if isinstance(job, TuneJob):
        narrow = narrowed(load_job(JOBS / job.base), small(128), thumbnails)
        search = {"search.trials": 1, "search.max_concurrent": 1, "schedule.grace_kimg": narrow["train.kimg"]}
        given = {"name": run_name, "overrides": json.dumps(narrow), **search}
    else:
        narrow = narrowed(job, small(job.model.resolution), thumbnails)
        given = {"name": run_name, "evaluate.cpus": 3, **narrow}  # no room beside training: one process fewer to start
    run = Driver(folder, env, job=path, tiny=False, **dict(o.split("=") for o in overrides) | given)
    assert run.end() == 0, run.output
    summary = run.summary(run_name)
    assert summary["score"]["metric"] == "fd_thumbnails"
    assert np.isfinite(summary["score"]["value"])
    assert summary["registered"]["alias"] == "champion"
    if isinstance(job, TrainJob):
        assert (summary["images"], summary["restarts"]) == (2 * job.optim.n_dis * BATCH, 0)
