"""What a training job decides, before anything starts: the method and its digest, and the arithmetic of the dry run."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config.schema import TrainJob
from pipeline.errors import UsageError
from sagan.config import ModelConfig


@dataclass(frozen=True)
class CollectionFacts:
    """What a plan needs to know of a collection's split. fetches: of shards, in an epoch, over the job's workers."""

    digest: str
    resolution: int
    classes: int
    images: int
    shards: int
    fetches: int


def complete(job: TrainJob, resolution: int, classes: int) -> TrainJob:
    """The job with what its collection decides. Raises UsageError where the job says otherwise."""
    try:
        model = job.model.for_collection(resolution, classes)
    except ValueError as error:
        remedy = "leave the key out to take the collection's, or give another data.train"
        if "classes" in str(error) and classes == 0:
            remedy = "the collection has no labels: leave model.classes out or set model.classes=0"
        raise UsageError(str(error), remedy) from None
    return job.model_copy(update={"model": model})


def method(job: TrainJob, collection_digest: str) -> dict[str, Any]:
    """Everything that decides the numbers of a run, by dotted key; where and how long a run takes is not in it."""
    decisive = {
        "seed": job.seed,
        "data.collection": collection_digest,
        "data.split": job.data.split,
        "data.flip": job.data.flip,
        "data.lanes": job.data.lanes,
        "data.window": job.data.window,
        "train.batch": job.train.batch,
        "train.precision": job.train.precision,
        **{f"model.{k}": v for k, v in job.model.to_dict().items()},
        **{f"optim.{k}": v for k, v in job.optim.to_dict().items()},
    }
    return json.loads(json.dumps(decisive))  # as it reads back from run.json: tuples are lists there


def digest(method: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(method, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a training job."""

    name: str
    resolution: int
    classes: int
    parameters_generator: int
    parameters_discriminator: int
    step_gflop_per_image: float
    global_batch: int
    workers: int
    images_per_worker: str
    steps: int
    images: int
    epochs: float | None
    evaluations: int
    checkpoints: int
    checkpoint_bytes: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(job: TrainJob, collection: CollectionFacts | None) -> Plan:
    """The dry run of a complete job. Without a collection epochs are unknown. Imports torch."""
    from sagan.cost import parameters, step_flop_per_image

    generator, discriminator = parameters(job.model)
    per_step = job.optim.n_dis * job.train.batch
    steps = math.ceil(job.train.kimg * 1000 / per_step)
    batch, workers = job.train.batch, job.train.workers
    low, high = batch // workers, -(-batch // workers)
    return Plan(
        name=job.name,
        resolution=job.model.size,
        classes=job.model.labels,
        parameters_generator=generator,
        parameters_discriminator=discriminator,
        step_gflop_per_image=round(step_flop_per_image(job.model, job.optim.n_dis) / 1e9, 3),
        global_batch=batch,
        workers=workers,
        images_per_worker=str(low) if low == high else f"{low} to {high}",
        steps=steps,
        images=steps * per_step,
        epochs=round(steps * per_step / collection.images, 2) if collection else None,
        evaluations=max(1, int(job.train.kimg / job.evaluate.kimg)),
        checkpoints=max(1, int(job.train.kimg / job.checkpoint.kimg)),
        # weights, two Adam moments each, and the generator's average, in float32
        checkpoint_bytes=4 * (3 * (generator + discriminator) + generator),
        notes=_notes(job, collection),
    )


def _notes(job: TrainJob, collection: CollectionFacts | None) -> tuple[str, ...]:
    notes = []
    if job.data.lanes % job.train.workers:
        cost = f"{collection.fetches} fetches an epoch for {collection.shards}" if collection else "each reads more"
        notes.append(
            f"{job.train.workers} workers do not divide data.lanes {job.data.lanes}: the sequence is the same, "
            f"but workers share shards ({cost})"
        )
    if job.train.batch % job.train.workers:
        notes.append(f"{job.train.workers} workers do not divide the batch: shares differ by one image")
    if collection is None:
        notes.append(f"{job.data.train} was not read: epochs are unknown")
    elif collection.images < job.train.batch:
        notes.append(f"the collection has {collection.images} images, fewer than one batch: batches span epochs")
    return tuple(notes)


def assumed_model(job: TrainJob) -> ModelConfig:
    """The model of a job whose collection cannot be read yet, from the job's own keys."""
    resolution = job.model.resolution or (job.data.pack.resolution if job.data.pack else None)
    if resolution is None:
        raise UsageError(
            f"{job.data.train} cannot be read and the job does not say its resolution",
            "add model.resolution=… and model.classes=… for a dry run without the collection",
        )
    return job.model.for_collection(resolution, job.model.classes or 0)
