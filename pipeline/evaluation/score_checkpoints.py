"""Scores the checkpoints of a training run."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager

import numpy as np
from PIL import Image

from pipeline.collection.manifest import Collection
from pipeline.config.schema import TrainJob
from pipeline.errors import SaganError
from pipeline.evaluation import metrics, publish_scores
from pipeline.evaluation.extractors.classifier import Classifier, require_classes
from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.evaluation.extractors.load_extractor import load_extractor
from pipeline.evaluation.features import Real
from pipeline.evaluation.sample_grid import sample_grid
from pipeline.evaluation.scorer import Scorer, open_scorer
from pipeline.runs.best_checkpoint import best_score
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.json_records import ScoreRecord
from pipeline.runs.score_protocol import Score
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import files
from pipeline.tracking.open_model import model_of_checkpoint
from sagan.trained_model import Model, statistics_name

log = logging.getLogger(__name__)

_TRIED = 16  # real images on which an extractor is tried before training


def check_scores(job: TrainJob) -> list[str]:
    """Check before training that the checkpoints can be scored. Return the names of the metrics of their scores.

    Raises:
        UsageError: The split or the score does not exist, there are too few images for a metric, the collection has no
            classes or no split `train` for the classifier, the file is not an extractor, or its features of real images
            are not finite.
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
    scorer = Scorer(job.evaluate, collection, job.data, extractor, None)
    scorer.ranking_metric()
    for samples in (job.evaluate.samples, job.evaluate.final_samples or job.evaluate.samples):
        scorer.require_enough_images(samples)
    first = np.asarray(collection.ids(job.evaluate.split)[:_TRIED])  # neighbours, which lie in one shard
    scorer.features(Real(collection, first, job.data), "first real images")
    return scorer.metric_names


def higher_is_better(job: TrainJob) -> bool:
    """Return whether a higher score ranks the job's checkpoints higher."""
    metric = metrics.metric_named(job.evaluate.score) or metrics.FRECHET_DISTANCE
    return metric.higher_is_better


def score_checkpoint(job: TrainJob, checkpoint: StoredCheckpoint, run_id: str) -> Score:
    """Score one checkpoint, record and log the score, and register the checkpoint where it is the run's best.

    A checkpoint with a score under the same protocol is not scored again. Raises CorruptError, UsageError,
    EnvironmentFault.
    """
    with open_job_scorer(job, job.evaluate.seed) as scorer:
        return score_and_record(job, checkpoint, run_id, scorer).score


# --- one checkpoint --------------------------------------------------------------------------------------------------


def open_job_scorer(job: TrainJob, classifier_seed: int) -> AbstractContextManager[Scorer]:
    return open_scorer(job.evaluate, Collection.open(job.data.train), job.data, classifier_seed)


def score_and_record(job: TrainJob, checkpoint: StoredCheckpoint, run_id: str, scorer: Scorer) -> ScoreRecord:
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
    picture = draw_grid(job, record, model, scorer.collection)
    with files.temporary_folder("grid") as temp:
        path = temp / f"{checkpoint.name}.png"
        picture.save(path)
        files.upload(path, run.grid_url(checkpoint.name))
        publish_scores.log_scores(job, run_id, [record], [path])
    run.write_score(record)  # last, since a checkpoint with a record is not processed again
    best = best_score(run.scores())
    if job.track.register_model and best and best.checkpoint == checkpoint.name:
        try:
            publish_scores.make_comparable(job, score, scorer)
            publish_scores.register(job, run_id, record, model, picture)
        except SaganError as error:
            log.warning(
                "%s is not registered now; it will be registered after training: %s", checkpoint.name, error.message
            )
    return record


def draw_grid(job: TrainJob, record: ScoreRecord, model: Model, collection: Collection) -> Image.Image:
    score = record.score
    value = "no score" if score.value is None else f"{score.metric} {score.value:.4g}"
    title = f"{job.name} · {record.images / 1000:g} kimg · {value}"
    return sample_grid(model, job.evaluate, collection, job.data, title)
