"""One front door for every kind of job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import plan
from pipeline.config.load import load
from pipeline.config.schema import EvaluateJob, Job, PackJob, TrainJob, TuneJob
from pipeline.errors import SaganError

if TYPE_CHECKING:
    from pipeline.evaluation.selftest import Finding


def run(path: Path | str, overrides: Mapping[str, Any] | None = None, *, fresh: bool = False) -> dict[str, Any]:
    """Run a job file to its end and return its summary: what runs/<name>/summary.json holds.

    Raises pipeline.errors.SaganError and its kin.
    """
    return execute(load(path, overrides), fresh=fresh)


def execute(job: Job, *, fresh: bool = False) -> dict[str, Any]:
    if isinstance(job, PackJob):
        return _pack(job)
    if isinstance(job, EvaluateJob):
        from pipeline.evaluation import evaluate

        _connect_workers(job)
        return evaluate.run(job)
    if isinstance(job, TuneJob):
        from pipeline.evaluation import evaluate
        from pipeline.tuning import sweep

        return sweep.tune(job, evaluate, fresh=fresh)
    return _train(job, fresh)


def self_test(job: EvaluateJob) -> list[Finding]:
    """What a job's extractor makes of its reference's images and of spoilt ones. Raises SaganError and its kin."""
    from pipeline.evaluation import selftest

    _connect_workers(job)
    return selftest.run(job.evaluate, job.reference)


def _connect_workers(job: EvaluateJob) -> None:
    from pipeline.training import cluster

    if job.evaluate.workers > 1:
        cluster.connect(job.evaluate.workers * job.evaluate.cpus)


def _train(job: TrainJob, fresh: bool) -> dict[str, Any]:
    from pipeline.evaluation import evaluate
    from pipeline.report.publish import publish
    from pipeline.training import run as training

    if fresh:
        training.forget(job)
    return training.train(job, evaluate, on_end=publish)


def _pack(job: PackJob) -> dict[str, Any]:
    from pipeline.data.pack import pack
    from pipeline.training import cluster

    cluster.join()
    collection = pack(job.destination, job.pack)
    return {
        "name": job.name,
        "kind": "pack",
        "url": collection.url,
        "digest": collection.digest,
        "images": {split: collection.size(split) for split in collection.splits},
    }


def dry_run(job: Job) -> plan.Plan | dict[str, Any]:
    """What a job would do; starts nothing. Reads the collection's manifest where it can be read."""
    if isinstance(job, TuneJob):
        from pipeline.config.load import trial_job

        trial = dry_run(trial_job(job, job.example))
        assert isinstance(trial, plan.Plan)
        return {"name": job.name, "kind": "tune", "trials": job.search.trials, "trial": trial.to_dict()}
    if not isinstance(job, TrainJob):
        return json.loads(job.model_dump_json())
    facts = _collection_facts(job)
    if facts is None:
        job = job.model_copy(update={"model": plan.assumed_model(job)})
    else:
        job = plan.complete(job, facts.resolution, facts.classes)
    return plan.plan(job, facts)


def _collection_facts(job: TrainJob) -> plan.CollectionFacts | None:
    from pipeline.data.index import Collection
    from pipeline.data.order import Order

    try:
        collection = Collection.open(job.data.train)
    except SaganError:
        return None
    sizes = collection.shard_sizes(job.data.split)
    images = collection.size(job.data.split)
    fetches = Order(sizes, job.seed, job.data.lanes, job.data.window).fetches(job.train.workers)
    return plan.CollectionFacts(
        collection.digest, collection.resolution, collection.classes, images, len(sizes), fetches
    )
