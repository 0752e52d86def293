"""What training and the command line ask of evaluation: check, score, protect, conclude."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from pipeline.config.schema import DataSection, EvaluateJob, EvaluateSection, TrainJob
from pipeline.data.index import Collection
from pipeline.errors import EnvironmentFault, SaganError
from pipeline.evaluation import metrics, publish, records
from pipeline.evaluation.classifier import Classifier, require_classes
from pipeline.evaluation.evaluator import Evaluator, load_extractor, open_evaluator
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.features import Generated
from pipeline.evaluation.measure import Score, measure, score_model, speaks_of
from pipeline.evaluation.models import of_checkpoint, open_model
from pipeline.evaluation.pictures import sample_picture
from pipeline.evaluation.records import ScoreRecord, scores_of
from pipeline.evaluation.statistics import frechet_distance
from pipeline.storage import files
from pipeline.storage.run_folder import images_of
from pipeline.tracking import registry
from pipeline.tracking.tracker import tracking_uri
from sagan.sampling import Model, statistics_name

log = logging.getLogger(__name__)
T = TypeVar("T")

ACCURACY_SAMPLES = 1000


def check(job: TrainJob) -> None:
    """Find out before training that its scores could not be taken.

    Raises UsageError (no such split, no such score, no classes for the classifier, a file that is no extractor),
    EnvironmentFault (no extractor file, no weights).
    """
    collection = Collection.open(job.data.train)
    collection.ids(job.evaluate.split)
    if job.evaluate.extractor == "classifier":
        require_classes(collection)  # names do not need it trained
        extractor = Extractor("classifier", "", Classifier(collection.resolution, collection.classes))
    else:
        extractor = load_extractor(job.evaluate, collection, job.data, job.evaluate.seed)
    Evaluator(job.evaluate, collection, job.data, extractor, None).ranking()


def higher_is_better(job: TrainJob) -> bool:
    """Of the score that ranks a job's checkpoints."""
    return metrics.higher_is_better(job.evaluate.score)


def score_checkpoint(job: TrainJob, checkpoint_url: str, run_id: str) -> dict[str, Any]:
    """Score, log, record and, if it is the run's best, register one checkpoint.

    Returns values by short name, the one that ranks first; it is None for a model that makes no finite images. What
    has been scored under the same protocol is returned as it was. Raises CorruptError, UsageError, EnvironmentFault.
    """
    with _evaluator(job, job.evaluate.seed) as evaluator:
        record = _score(job, files.name(checkpoint_url), run_id, evaluator)
    return {record.score.key: record.score.value, **record.score.values}


def protected(job: TrainJob) -> set[str]:
    """Names of checkpoints that retention must keep: the best, those that wait for a score, and those that registered
    versions name. While the registry cannot be asked, all.
    """
    scored = scores_of(job)
    best = records.best(scored.values())
    names = set(_due(job)) - scored.keys() | ({best.checkpoint} if best else set())
    if job.track.register_model:
        try:
            urls = registry.checkpoints(tracking_uri(job), job.registry_name)
        except EnvironmentFault as fault:
            log.warning("no checkpoint is deleted for now: %s", fault.message)
            return set(job.folder.checkpoints())
        names |= {files.name(url) for url in urls if url == job.folder.checkpoint(files.name(url))}
    return names


def finalise(job: TrainJob, run_id: str) -> dict[str, Any]:
    """Score what is due and unscored, register the best, move `champion`, and score the best once more.

    The last score is an independent one: other latents and, with the classifier, another judge (seed + 1 for both);
    the mean over `evaluate.repeats` ranges of samples.

    Returns the summary's part: `score` (that ranked), `final` (the independent one), `class_accuracy` (over 1 000
    samples), `fd_classifier`, `fd_classifier_real` (held-out against training images), `registered`, `grid`,
    `checkpoint`; None for what there is not. Raises UsageError, EnvironmentFault, CorruptError.
    """
    return with_resources(job.evaluate, _finalise, job, run_id)


def run(job: EvaluateJob) -> dict[str, Any]:
    """Score one model; returns `score` and all `values` by short name."""
    section, collection = job.evaluate, Collection.open(job.reference)
    data, seed = DataSection(train=job.reference), section.seed
    model = open_model(job.model, tracking_uri=job.track.uri, **_generator(section))
    score = score_model(model, section, collection, data=data, seed=seed, samples=section.samples, judge_seed=seed)
    return {
        "name": job.name,
        "kind": "evaluate",
        "model": job.model,
        "score": score.summary(),
        "values": score.values,
    }


# --- one checkpoint --------------------------------------------------------------------------------------------------


def _evaluator(job: TrainJob, judge_seed: int) -> AbstractContextManager[Evaluator]:
    return open_evaluator(job.evaluate, Collection.open(job.data.train), job.data, judge_seed)


def _score(job: TrainJob, checkpoint: str, run_id: str, evaluator: Evaluator) -> ScoreRecord:
    """The record of a checkpoint, taken now unless it stands."""
    section, key = job.evaluate, evaluator.ranking()
    kind = (section.generator, statistics_name(section.standing_images))
    protocol = evaluator.protocol(kind, seed=section.seed, samples=section.samples)
    known = records.read(job, checkpoint)
    if known and known.score.protocol == protocol and (key in known.score.values or not known.score.values):
        return replace(known, score=replace(known.score, key=key))
    began = time.monotonic()
    model = _model(job, checkpoint, evaluator.extractor.device)
    score = measure(model, evaluator, protocol)
    images = images_of(checkpoint)
    record = ScoreRecord(checkpoint, images, score, time.monotonic() - began, int(time.time() * 1000))
    picture = _picture(job, record, model, evaluator.collection)
    with tempfile.TemporaryDirectory(prefix="sagan-grid-") as temp:
        path = Path(temp) / f"{checkpoint}.png"
        picture.save(path)
        files.upload(path, job.folder.grid(checkpoint))
        publish.log_scores(job, run_id, [record], [path])
    records.write(job, record)  # last: what has a record is done
    best = records.best(scores_of(job).values())
    if job.track.register_model and best and best.checkpoint == checkpoint:
        try:
            publish.make_champion_comparable(job, score, evaluator)
            publish.register(job, run_id, record, model, picture)
        except SaganError as error:
            log.warning("%s will be registered after training: %s", checkpoint, error.message)
    return record


def _model(job: TrainJob, checkpoint: str, device: str) -> Model:
    return of_checkpoint(job.folder.checkpoint(checkpoint), device, **_generator(job.evaluate))


def _generator(section: EvaluateSection) -> dict[str, Any]:
    """Which generator of a checkpoint a section means."""
    return {"weights": section.generator, "standing_images": section.standing_images, "seed": section.seed}


def _picture(job: TrainJob, record: ScoreRecord, model: Model, collection: Collection) -> Image.Image:
    value = "no score" if record.score.value is None else f"{record.score.key} {record.score.value:.4g}"
    title = f"{job.name} · {record.images / 1000:g} kimg · {value}"
    return sample_picture(model, job.evaluate, collection, job.data, title)


# --- at the end ------------------------------------------------------------------------------------------------------


def _finalise(job: TrainJob, run_id: str) -> dict[str, Any]:
    with _evaluator(job, job.evaluate.seed) as evaluator:
        for checkpoint in _due(job):
            _score(job, checkpoint, run_id, evaluator)
        standing = [record for name, record in scores_of(job).items() if name in set(job.folder.checkpoints())]
        best = records.best(standing)
        if best is None:
            publish.log_scores(job, run_id, standing, [])
            return dict.fromkeys(_SUMMARY)
        model = _model(job, best.checkpoint, evaluator.extractor.device)
        registered = None
        if job.track.register_model:
            publish.make_champion_comparable(job, best.score, evaluator)
            picture = _picture(job, best, model, evaluator.collection)
            registered = publish.register(job, run_id, best, model, picture)
    final, figures = _final_score(job, model)
    publish.log_scores(job, run_id, [*standing, replace(best, score=final)], [])  # also what an outage kept back
    return {
        "score": best.score.summary(),
        "final": final.summary(),
        **figures,
        "registered": registered,
        "grid": job.folder.grid(best.checkpoint),
        "checkpoint": job.folder.checkpoint(best.checkpoint),
    }


_SUMMARY = (
    *("score", "final", "class_accuracy", "fd_classifier", "fd_classifier_real"),
    *("registered", "grid", "checkpoint"),
)


def _final_score(job: TrainJob, model: Model) -> tuple[Score, dict[str, float | None]]:
    section, seed = job.evaluate, job.evaluate.seed + 1
    accuracy, between_real = None, None
    with _evaluator(job, seed) as evaluator:
        samples, splits = section.final_samples or section.samples, evaluator.collection.splits
        if section.extractor == "classifier":
            samples = min(samples, evaluator.collection.size(section.split))
        kind = (model.weights, model.batch_norm)
        score = measure(model, evaluator, evaluator.protocol(kind, seed=seed, samples=samples, repeats=section.repeats))
        real = evaluator.reference(section.split)
        if speaks_of(model, real):
            made = evaluator.features(Generated(model, seed, range(ACCURACY_SAMPLES)), "samples")
            accuracy = metrics.class_accuracy(made.logits, made.labels)
        if section.extractor == "classifier" and "heldout" in splits:
            between_real = frechet_distance(evaluator.reference("heldout").moments, real.moments)
    figures = {
        "class_accuracy": accuracy,
        "fd_classifier": score.values.get("fd_classifier"),
        "fd_classifier_real": between_real,
    }
    return score, figures


def _due(job: TrainJob) -> list[str]:
    """The checkpoints that should have a score: those made for it, and the newest."""
    complete = job.folder.checkpoints()

    def made_for_it(name: str) -> bool:
        return bool(files.read_json(files.join(job.folder.checkpoint(name), "checkpoint.json")).get("evaluate", True))

    return [name for name in complete if name == complete[-1] or made_for_it(name)]


# --- where -----------------------------------------------------------------------------------------------------------


def with_resources(section: EvaluateSection, function: Callable[..., T], *arguments: Any) -> T:
    """Run here, or as a Ray task on a GPU of the cluster where the section asks for one."""
    import ray

    if not section.gpus or section.workers > 1 or not ray.is_initialized():
        return function(*arguments)
    task = ray.remote(num_cpus=section.cpus, num_gpus=section.gpus)(function)
    try:
        result: T = ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    return result
