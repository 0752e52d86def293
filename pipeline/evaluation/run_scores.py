"""Scores a training run: each checkpoint that is due, and the best checkpoint once more at the end."""

from __future__ import annotations

import logging
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path

from PIL import Image

from pipeline.collection.manifest import Collection
from pipeline.compute.tasks import run_as_task
from pipeline.config.schema import TrainJob
from pipeline.errors import EnvironmentFault, SaganError
from pipeline.evaluation import champion, metrics
from pipeline.evaluation.extractors.by_name import load_extractor
from pipeline.evaluation.extractors.classifier import Classifier, require_classes
from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.evaluation.features import Generated
from pipeline.evaluation.moments import frechet_distance
from pipeline.evaluation.open_model import model_of_checkpoint
from pipeline.evaluation.sample_grid import sample_grid
from pipeline.evaluation.scorer import Scorer, open_scorer
from pipeline.runs.records import RunScores, ScoreRecord, best_score
from pipeline.runs.score import Score
from pipeline.runs.stored_run import StoredCheckpoint, StoredRun
from pipeline.storage import files
from pipeline.tracking import registry
from pipeline.tracking.mlflow_run import tracking_uri
from sagan.sampling import Model, statistics_name

log = logging.getLogger(__name__)

ACCURACY_SAMPLES = 1000
"""Number of generated images from which the final class accuracy is computed."""


def check(job: TrainJob) -> None:
    """Check before training that the checkpoints can be scored.

    Raises:
        UsageError: The split or the score does not exist, the collection has no classes for the classifier, or the file
            is not an extractor.
        EnvironmentFault: The extractor file or the extractor's parameters do not exist.
    """
    collection = Collection.open(job.data.train)
    collection.ids(job.evaluate.split)
    if job.evaluate.extractor == "classifier":
        require_classes(collection)
        # Names of metrics do not need a trained classifier.
        untrained = Classifier(collection.resolution, collection.num_classes)
        extractor = Extractor("classifier", "", untrained)
    else:
        extractor = load_extractor(job.evaluate, collection, job.data, job.evaluate.seed)
    Scorer(job.evaluate, collection, job.data, extractor, None).ranking_metric()


def higher_is_better(job: TrainJob) -> bool:
    """Return whether a higher score ranks the job's checkpoints higher."""
    metric = metrics.metric_named(job.evaluate.score) or metrics.FRECHET_DISTANCE
    return metric.higher_is_better


def score_checkpoint(job: TrainJob, checkpoint: StoredCheckpoint, run_id: str) -> Score:
    """Score one checkpoint, record and log the score, and register the checkpoint where it is the run's best.

    A checkpoint with a score under the same protocol is not scored again. Raises CorruptError, UsageError,
    EnvironmentFault.
    """
    with _open_scorer(job, job.evaluate.seed) as scorer:
        return _score(job, checkpoint, run_id, scorer).score


def protected(job: TrainJob) -> set[str]:
    """Return the names of the checkpoints that retention must keep.

    Retention must keep the best checkpoint, the checkpoints that wait for a score, and the checkpoints that registered
    versions name. It must keep all checkpoints while the registry cannot be reached.
    """
    run = StoredRun.of(job)
    scores = run.scores()
    best = best_score(scores)
    names = {checkpoint.name for checkpoint in _due(run)} - {record.checkpoint for record in scores}
    names |= {best.checkpoint} if best else set()
    if job.track.register_model:
        try:
            urls = registry.checkpoints(tracking_uri(job), job.registry_name)
        except EnvironmentFault as fault:
            log.warning("the registry cannot be reached, so no checkpoint is deleted now: %s", fault.message)
            return {checkpoint.name for checkpoint in run.checkpoints()}
        names |= {files.name(url) for url in urls if url == run.checkpoint(files.name(url)).url}
    return names


def finalise(job: TrainJob, run_id: str) -> RunScores:
    """Score the checkpoints that are due, register the best one, move `champion`, and score the best one once more.

    The final score is independent of the first score. It uses other latents and, where the extractor is `classifier`,
    another classifier. Both use seed + 1. The final score is the mean over `evaluate.repeats` ranges of samples.

    The function runs as a task on the cluster where `evaluate.gpus` is above 0 and `evaluate.workers` is 1.
    Raises UsageError, EnvironmentFault, CorruptError.
    """
    if job.evaluate.gpus and job.evaluate.workers == 1:
        return run_as_task(_finalise, job, run_id, cpus=job.evaluate.cpus, gpus=job.evaluate.gpus)
    return _finalise(job, run_id)


# --- one checkpoint --------------------------------------------------------------------------------------------------


def _open_scorer(job: TrainJob, classifier_seed: int) -> AbstractContextManager[Scorer]:
    return open_scorer(job.evaluate, Collection.open(job.data.train), job.data, classifier_seed)


def _score(job: TrainJob, checkpoint: StoredCheckpoint, run_id: str, scorer: Scorer) -> ScoreRecord:
    """Return the record of a checkpoint. Score the checkpoint unless a record under the same protocol exists."""
    run, section = StoredRun.of(job), job.evaluate
    batch_norm = statistics_name(section.standing_images)
    protocol = scorer.protocol_of(section.weights, batch_norm, seed=section.seed, samples=section.samples)
    known = run.score(checkpoint)
    if known and known.score.protocol == protocol:
        ranking = scorer.ranking_metric()
        metric, values = ranking.name_under(scorer.extractor), known.score.values
        if metric in values or not values:
            return known.model_copy(
                update={"score": Score.of(protocol, metric, ranking.higher_is_better, values, known.score.deviations)}
            )
    began = time.monotonic()
    model = model_of_checkpoint(checkpoint, section, scorer.extractor.device)
    score = scorer.score(model, protocol)
    record = ScoreRecord(
        checkpoint=checkpoint.name,
        images=checkpoint.images,
        score=score,
        seconds=round(time.monotonic() - began, 2),
        time_ms=int(time.time() * 1000),
    )
    picture = _grid(job, record, model, scorer.collection)
    with tempfile.TemporaryDirectory(prefix="sagan-grid-") as temp:
        path = Path(temp) / f"{checkpoint.name}.png"
        picture.save(path)
        files.upload(path, run.grid_url(checkpoint.name))
        champion.log_scores(job, run_id, [record], [path])
    run.write_score(record)  # last, since a checkpoint with a record is not processed again
    best = best_score(run.scores())
    if job.track.register_model and best and best.checkpoint == checkpoint.name:
        try:
            champion.make_comparable(job, score, scorer)
            champion.register(job, run_id, record, model, picture)
        except SaganError as error:
            log.warning(
                "%s is not registered now; it will be registered after training: %s", checkpoint.name, error.message
            )
    return record


def _grid(job: TrainJob, record: ScoreRecord, model: Model, collection: Collection) -> Image.Image:
    score = record.score
    value = "no score" if score.value is None else f"{score.metric} {score.value:.4g}"
    title = f"{job.name} · {record.images / 1000:g} kimg · {value}"
    return sample_grid(model, job.evaluate, collection, job.data, title)


def _due(run: StoredRun) -> list[StoredCheckpoint]:
    """Return the checkpoints that should have a score: the ones written for scoring, and the newest one."""
    complete = run.checkpoints()
    return [checkpoint for checkpoint in complete if checkpoint is complete[-1] or checkpoint.facts().to_score]


# --- at the end ------------------------------------------------------------------------------------------------------


def _finalise(job: TrainJob, run_id: str) -> RunScores:
    run = StoredRun.of(job)
    with _open_scorer(job, job.evaluate.seed) as scorer:
        for checkpoint in _due(run):
            _score(job, checkpoint, run_id, scorer)
        complete = {checkpoint.name for checkpoint in run.checkpoints()}
        scores = [record for record in run.scores() if record.checkpoint in complete]
        best = best_score(scores)
        if best is None:
            champion.log_scores(job, run_id, scores, [])
            return RunScores()
        checkpoint = run.checkpoint(best.checkpoint)
        model = model_of_checkpoint(checkpoint, job.evaluate, scorer.extractor.device)
        registered = None
        if job.track.register_model:
            champion.make_comparable(job, best.score, scorer)
            registered = champion.register(job, run_id, best, model, _grid(job, best, model, scorer.collection))
    final = _final_scores(job, model)
    assert final.final is not None
    # All scores are sent again, since the tracker may have missed some during an outage.
    champion.log_scores(job, run_id, [*scores, best.model_copy(update={"score": final.final})], [])
    return final.model_copy(
        update={
            "score": best.score,
            "registered": registered,
            "grid": run.grid_url(best.checkpoint),
            "checkpoint": checkpoint.url,
        }
    )


def _final_scores(job: TrainJob, model: Model) -> RunScores:
    """Score the best model independently, and compute the class accuracy and the distance between real splits."""
    section, seed = job.evaluate, job.evaluate.seed + 1
    accuracy, between_real = None, None
    with _open_scorer(job, seed) as scorer:
        samples, splits = section.final_samples or section.samples, scorer.collection.splits
        if section.extractor == "classifier":
            samples = min(samples, scorer.collection.size(section.split))
        score = scorer.score(model, scorer.protocol(model, seed=seed, samples=samples, repeats=section.repeats))
        if scorer.classes_match(model):
            generated = scorer.features(Generated(model, seed, range(ACCURACY_SAMPLES)), "samples")
            accuracy = metrics.class_accuracy(generated.logits, generated.labels)
        if section.extractor == "classifier" and "heldout" in splits:
            heldout, real = scorer.reference("heldout"), scorer.reference(section.split)
            between_real = frechet_distance(heldout.moments, real.moments)
    return RunScores(
        final=score,
        class_accuracy=accuracy,
        fd_classifier=score.values.get("fd_classifier"),
        fd_classifier_real=between_real,
    )
