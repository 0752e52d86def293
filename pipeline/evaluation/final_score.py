"""The end of a training run: the best checkpoint is registered, and scored once more."""

from __future__ import annotations

from pipeline.compute.tasks import run_as_task
from pipeline.config.schema import TrainJob
from pipeline.errors import shown_url
from pipeline.evaluation import metrics, publish_scores
from pipeline.evaluation.features import Generated
from pipeline.evaluation.frechet_distance import frechet_distance
from pipeline.evaluation.score_checkpoints import draw_grid, open_job_scorer, score_and_record
from pipeline.runs.best_checkpoint import best_score
from pipeline.runs.json_records import RunScores
from pipeline.runs.stored_run import StoredRun
from pipeline.tracking.open_model import model_of_checkpoint
from sagan.trained_model import Model

ACCURACY_SAMPLES = 1000
"""Number of generated images from which the final class accuracy is computed."""


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


def score_due(job: TrainJob, run_id: str) -> None:
    """Score the checkpoints that are due and have no score. The function runs where `finalise` runs.

    Raises UsageError, EnvironmentFault, CorruptError.
    """
    run = StoredRun.of(job)
    if all(run.score(checkpoint) for checkpoint in run.checkpoints_to_score()):
        return
    if job.evaluate.gpus and job.evaluate.workers == 1:
        run_as_task(_score_due, job, run_id, cpus=job.evaluate.cpus, gpus=job.evaluate.gpus)
    else:
        _score_due(job, run_id)


def _score_due(job: TrainJob, run_id: str) -> None:
    with open_job_scorer(job, job.evaluate.seed) as scorer:
        for checkpoint in StoredRun.of(job).checkpoints_to_score():
            score_and_record(job, checkpoint, run_id, scorer)


def _finalise(job: TrainJob, run_id: str) -> RunScores:
    run = StoredRun.of(job)
    with open_job_scorer(job, job.evaluate.seed) as scorer:
        for checkpoint in run.checkpoints_to_score():
            score_and_record(job, checkpoint, run_id, scorer)
        complete = {checkpoint.name for checkpoint in run.checkpoints()}
        scores = [record for record in run.scores() if record.checkpoint in complete]
        best = best_score(scores)
        if best is None:
            publish_scores.log_scores(job, run_id, scores, [])
            return RunScores()
        checkpoint = run.checkpoint(best.checkpoint)
        model = model_of_checkpoint(checkpoint, job.evaluate, scorer.extractor.device)
        registered = None
        if job.track.register_model:
            publish_scores.make_comparable(job, best.score, scorer)
            registered = publish_scores.register(
                job, run_id, best, model, draw_grid(job, best, model, scorer.collection)
            )
    final = _final_scores(job, model)
    assert final.final is not None
    # All scores are sent again, since the tracker may have missed some during an outage.
    publish_scores.log_scores(job, run_id, [*scores, best.model_copy(update={"score": final.final})], [])
    return final.model_copy(
        update={
            "score": best.score,
            "registered": registered,
            "grid": shown_url(run.grid_url(best.checkpoint)),
            "checkpoint": shown_url(checkpoint.url),
        }
    )


def _final_scores(job: TrainJob, model: Model) -> RunScores:
    """Score the best model independently, and compute the class accuracy and the distance between real splits."""
    section, seed = job.evaluate, job.evaluate.seed + 1
    accuracy, between_real = None, None
    with open_job_scorer(job, seed) as scorer:
        samples, splits = section.final_samples or section.samples, scorer.collection.splits
        if section.extractor == "classifier":
            samples = min(samples, scorer.collection.size(section.split))
        score = scorer.score(model, scorer.protocol(model, seed=seed, samples=samples, repeats=section.repeats))
        if scorer.classes_match(model):
            generated = scorer.features(Generated(model, seed, range(ACCURACY_SAMPLES)), "samples")
            accuracy = metrics.class_accuracy(generated.logits, generated.labels)
        enough = "heldout" in splits and scorer.collection.size("heldout") >= metrics.FRECHET_DISTANCE.least_images
        if section.extractor == "classifier" and enough:
            heldout, real = scorer.reference("heldout"), scorer.reference(section.split)
            between_real = frechet_distance(heldout.moments, real.moments)
    return RunScores(
        final=score,
        class_accuracy=accuracy,
        fd_classifier=score.values.get("fd_classifier"),
        fd_classifier_real=between_real,
    )
