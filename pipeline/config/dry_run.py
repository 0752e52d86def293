"""The dry run of a training job or a study: its sizes, steps, costs and notes, computed before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config.run_method import complete_model
from pipeline.config.schema import StudyJob, TrainJob
from pipeline.errors import UsageError
from sagan.config import ModelConfig


@dataclass(frozen=True)
class CollectionFacts:
    """What a dry run needs to know about a split of a collection.

    Attributes:
        resolution: Pixels per side.
        num_classes: Number of classes; 0 without labels.
        images: Number of images.
        shards: Number of shards.
        fetches: Number of shards that all workers of the job together fetch in an epoch.
    """

    resolution: int
    num_classes: int
    images: int
    shards: int
    fetches: int


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run.

    Attributes:
        name: Name of the job.
        resolution: Pixels per side.
        num_classes: Number of classes; 0 without labels.
        parameters_generator: Number of parameters of the generator.
        parameters_discriminator: Number of parameters of the discriminator.
        step_gflop_per_image: GFLOP of a training step per image.
        global_batch: Images per batch over all workers.
        workers: Number of workers.
        images_per_worker: Images of a batch per worker: a number, or `LOW to HIGH`.
        steps: Number of training steps, each with `optim.n_dis` updates of the discriminator.
        images: Number of real images that the discriminator receives.
        epochs: Number of passes over the collection; None where the collection cannot be read.
        evaluations: Number of scores of checkpoints.
        checkpoints: Number of checkpoints.
        checkpoint_bytes: Approximate size of a checkpoint.
        notes: What a person should know before the start, one sentence each.
    """

    name: str
    resolution: int
    num_classes: int
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


def dry_run(job: TrainJob, collection: CollectionFacts | None) -> DryRun:
    """Compute the dry run of a job.

    Args:
        job: The job.
        collection: Facts of the job's collection; None where the collection cannot be read. Epochs are unknown then.

    Raises UsageError where the job contradicts the collection, or where neither of them gives the resolution.
    """
    model = (
        _expected_model(job)
        if collection is None
        else complete_model(job, collection.resolution, collection.num_classes).model
    )
    from sagan.cost import parameters, step_flop_per_image

    generator, discriminator = parameters(model)
    per_step = job.optim.n_dis * job.train.batch
    steps = math.ceil(job.train.kimg * 1000 / per_step)
    batch, workers = job.train.batch, job.train.workers
    low, high = batch // workers, -(-batch // workers)
    return DryRun(
        name=job.name,
        resolution=model.known_resolution,
        num_classes=model.known_num_classes,
        parameters_generator=generator,
        parameters_discriminator=discriminator,
        step_gflop_per_image=round(step_flop_per_image(model, job.optim.n_dis) / 1e9, 3),
        global_batch=batch,
        workers=workers,
        images_per_worker=str(low) if low == high else f"{low} to {high}",
        steps=steps,
        images=steps * per_step,
        epochs=round(steps * per_step / collection.images, 2) if collection else None,
        evaluations=max(1, int(min(steps, job.train.kimg / job.evaluate.kimg))),  # at most one after each step
        checkpoints=max(1, int(min(steps, job.train.kimg / job.checkpoint.kimg))),
        # parameters and two Adam moments of both networks, and the generator's moving average, in float32
        checkpoint_bytes=4 * (3 * (generator + discriminator) + generator),
        notes=_notes(job, collection),
    )


def study_dry_run(
    study: StudyJob,
    rows: Mapping[str, DryRun],
    ended: int | None,
    tuning: Mapping[str, tuple[int, DryRun]],
    spending: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the dry run of a study: its totals, the facts that all rows share, and those in which rows differ.

    Args:
        study: The study.
        rows: The dry run of one run of each row, by name of the row.
        ended: Number of runs that have ended; None where their storage cannot be read.
        tuning: Number of trials of each row that is tuned, and the dry run of one of them, by name of the row. A trial
            may be stopped early.
        spending: What the runs have spent and are expected to spend, and notes about it.
    """
    facts = {row: {key: value for key, value in run.to_dict().items() if key != "name"} for row, run in rows.items()}
    first = next(iter(facts.values()))
    shared = {key: value for key, value in first.items() if all(of_row[key] == value for of_row in facts.values())}
    seeds, images = len(study.seeds), sum(run.images for run in rows.values())
    gflop = sum(run.images * run.step_gflop_per_image for run in rows.values())
    return {
        "name": study.name,
        "kind": "study",
        "runs": seeds * len(rows),
        "ended": ended,
        "seeds": seeds,
        "kimg": seeds * images / 1000,
        "nominal_exaflop": seeds * gflop / 1e9,
        "tuning": _tuning_totals(tuning) if tuning else None,
        **spending,
        "run": shared,
        "rows": {
            row: {key: value for key, value in of_row.items() if key not in shared} or "no difference"
            for row, of_row in facts.items()
        },
    }


def _tuning_totals(tuning: Mapping[str, tuple[int, DryRun]]) -> dict[str, Any]:
    """Return what the sweeps of a study cost at most, beside its runs."""
    gflop = sum(trials * run.images * run.step_gflop_per_image for trials, run in tuning.values())
    return {
        "trials": sum(trials for trials, _ in tuning.values()),
        "most_kimg": sum(trials * run.images for trials, run in tuning.values()) / 1000,
        "most_nominal_exaflop": gflop / 1e9,
    }


def _notes(job: TrainJob, collection: CollectionFacts | None) -> tuple[str, ...]:
    """Return what a person should know before the job starts."""
    notes = []
    if job.data.lanes % job.train.workers:
        cost = f"{collection.fetches} fetches of {collection.shards} shards" if collection else "more fetches of shards"
        notes.append(
            f"data.lanes {job.data.lanes} is not a multiple of train.workers {job.train.workers}: the order of samples "
            f"stays the same, but several workers read the same shards ({cost} per epoch)"
        )
    if job.train.batch % job.train.workers:
        notes.append(
            f"train.batch {job.train.batch} is not a multiple of train.workers {job.train.workers}: some workers take "
            "one image more than others"
        )
    if job.train.changes_size:
        notes.append(
            f"the run trains with {job.train.least_workers} to {job.train.workers} workers, as many as fit; the "
            f"figures are for {job.train.workers}"
        )
    if collection is None:
        notes.append(f"{job.data.train} cannot be read: the number of epochs is unknown")
        if job.model.num_classes is None and job.data.expected_classes is None:
            notes.append("the number of classes is unknown, so the dry run assumes 0: set data.expected_classes")
    elif job.data.expected_classes not in (None, collection.num_classes):
        notes.append(f"{job.data.train} has {collection.num_classes} classes, not {job.data.expected_classes}")
    if collection and collection.images < job.train.batch:
        notes.append(f"the collection has {collection.images} images, fewer than a batch: a batch spans epochs")
    return tuple(notes)


def _expected_model(job: TrainJob) -> ModelConfig:
    """Return the model of a job whose collection cannot be read, from the keys of the job alone."""
    resolution = job.model.resolution or (job.data.pack.resolution if job.data.pack else None)
    if resolution is None:
        raise UsageError(
            f"{job.data.train} cannot be read, and the job does not give the resolution",
            "add model.resolution=… and model.num_classes=… for a dry run without the collection",
        )
    num_classes = job.model.num_classes if job.model.num_classes is not None else job.data.expected_classes
    return job.model.for_collection(resolution, num_classes or 0)
