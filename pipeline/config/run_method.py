"""The method of a run: all values that determine its result. A run with another method needs another name."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pipeline.config.schema import TrainJob, TuneJob
from pipeline.errors import UsageError

ADDED: dict[str, Any] = {
    "model.architecture": "resnet",
    "model.condition_d": "projection",
    "model.init_std": None,
    "optim.loss": "hinge",
    "optim.auxiliary_weight": 1.0,
    "data.augment": None,
}
"""Keys that were added to the method after runs were stored, each with the value that the older runs had.

A new key of `model`, `optim` or `data` belongs here, with the behaviour of the code before it. So does the version of a
rule that decides numbers and has no key, such as the order of samples or the initial weights, when the rule changes:
`"order": 1`, while `method_of` gives 2.
"""


def complete_model(job: TrainJob, resolution: int, num_classes: int) -> TrainJob:
    """Return the job with the resolution and the number of classes of its collection.

    Raises UsageError where the job gives other values.
    """
    try:
        model = job.model.for_collection(resolution, num_classes)
    except ValueError as error:
        remedy = "leave the key out to take the collection's value, or give another data.train"
        if "but the collection has" not in str(error):
            remedy = f"the images of the collection have {resolution} px: correct the key for networks of this size"
        if "num_classes" in str(error) and num_classes == 0:
            remedy = "the collection has no labels: leave model.num_classes out, or set model.num_classes=0"
        raise UsageError(str(error), remedy) from None
    return job.model_copy(update={"model": model})


def method_of(job: TrainJob, collection_digest: str, init_sha256: str | None = None) -> dict[str, Any]:
    """Return the method of a job, by dotted key. Paths, lengths, intervals and resources are not part of a method.

    Args:
        job: The job.
        collection_digest: Digest of the job's collection.
        init_sha256: Digest of the state that the job starts from. The method of a job without `init` has no such keys.
    """
    method = {
        "seed": job.seed,
        "data.collection": collection_digest,
        "data.split": job.data.split,
        "data.flip": job.data.flip,
        "data.augment": job.data.augment,
        "data.lanes": job.data.lanes,
        "data.window": job.data.window,
        "train.batch": job.train.batch,
        "train.precision": job.train.precision,
        **{f"model.{k}": v for k, v in job.model.to_dict().items()},
        **{f"optim.{k}": v for k, v in job.optim.to_dict().items()},
    }
    if job.init is not None:
        method["init.sha256"] = init_sha256
        method |= {f"init.{key}": value for key, value in job.init.model_dump(exclude={"source"}).items()}
    return json.loads(json.dumps(method))  # tuples become lists, as in a method that is read from run.json


def sweep_method_of(
    sweep: TuneJob, base: TrainJob, collection_digest: str, init_sha256: str | None = None
) -> dict[str, Any]:
    """Return the method of a sweep, by dotted key: its space, its overrides and the method of its base job.

    The number of trials is not part of it, because a larger number continues a sweep. The size of a population is, and
    so is all that decides about it.

    Args:
        sweep: The sweep job.
        base: A job of the sweep's trials. Its values of the keys in the space are ignored.
        collection_digest: Digest of the base job's collection.
        init_sha256: Digest of the state that the base job starts from.
    """
    base_method = method_of(base, collection_digest, init_sha256)
    method = {
        **{key: value for key, value in base_method.items() if key not in sweep.space},
        **{f"overrides.{key}": value for key, value in sweep.overrides.items()},
        **{f"space.{key}": choice.model_dump(exclude_none=True) for key, choice in sweep.space.items()},
    }
    if sweep.pbt is not None:
        method |= {f"schedule.pbt.{key}": value for key, value in sweep.pbt.model_dump().items()}
        method |= {"search.trials": sweep.search.trials, "search.seed": sweep.search.seed}
    return json.loads(json.dumps(method))


def completed(method: dict[str, Any]) -> dict[str, Any]:
    """Return a stored method of a run or a sweep with the keys that it lacks because they were added later."""
    return {**{key: value for key, value in ADDED.items() if f"space.{key}" not in method}, **method}


def method_differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return a line for each key in which the method of a stored run differs from that of a job."""

    def shown(method: dict[str, Any], key: str) -> str:
        return repr(method[key]) if key in method else "absent"

    keys = sorted(theirs.keys() | ours.keys())
    return [
        f"{key}: {shown(theirs, key)} in that run, {shown(ours, key)} in this job"
        for key in keys
        if shown(theirs, key) != shown(ours, key)
    ]


def digest_of(method: dict[str, Any]) -> str:
    """Return the SHA-256 of a method in hex.

    Added keys with the value of older runs are left out, so that the digests of older checkpoints stay valid.
    """
    method = {key: value for key, value in method.items() if key not in ADDED or value != ADDED[key]}
    return hashlib.sha256(json.dumps(method, sort_keys=True).encode()).hexdigest()
