"""Publishes scores and models to MLflow: logs scores, and registers the best model of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from pipeline.config.schema import TrainJob
from pipeline.errors import CorruptError, shown_url
from pipeline.evaluation.scorer import Scorer
from pipeline.runs.json_records import RegisteredModel, ScoreRecord
from pipeline.runs.score_protocol import Score
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import file_sets, files
from pipeline.tracking import registry
from pipeline.tracking.champion import promote_best
from pipeline.tracking.init_source import describe
from pipeline.tracking.mlflow_run import MlflowRun, tracking_uri
from pipeline.tracking.model_card import model_card
from pipeline.tracking.open_model import open_model
from sagan.trained_model import Model

log = logging.getLogger(__name__)

DELIVERY_S = 30.0
"""Longest time that `log_scores` waits for MLflow, in seconds."""


def log_scores(job: TrainJob, run_id: str, records: Iterable[ScoreRecord], pictures: Iterable[Path]) -> None:
    """Send scores, their protocols and pictures to the MLflow run. The run keeps values that it already has.

    Waits at most 30 seconds for a tracker that does not answer, and then logs a warning.
    """
    with files.temporary_folder("scores") as temp:
        tracker = MlflowRun(tracking_uri(job), run_id)
        for record in records:
            protocol = record.score.protocol
            values = {protocol.key(name): value for name, value in record.score.values.items()}
            tracker.log(values, record.images, record.time_ms)
            path = temp / f"{protocol.id8}.json"
            path.write_text(json.dumps(protocol.to_dict(), indent=1))
        for path in temp.iterdir():
            tracker.log_file(path, "protocols")
        for path in pictures:
            tracker.log_file(path, "grids")
        tracker.close(DELIVERY_S)


def register(job: TrainJob, run_id: str, record: ScoreRecord, model: Model, grid: Image.Image) -> RegisteredModel:
    """Register the model of a scored checkpoint unless it is registered, and move `champion` to the best version.

    Args:
        job: The training job.
        run_id: Id of the MLflow run.
        record: Score of the checkpoint.
        model: Generator of the checkpoint.
        grid: Picture of samples, which becomes `samples.png` of the version.

    Returns the version, with its alias where it is the champion. Raises EnvironmentFault, CorruptError.
    """
    uri, score = tracking_uri(job), record.score
    stored = StoredRun.of(job)
    checkpoint, run = stored.checkpoint(record.checkpoint), stored.record()
    manifest, facts = file_sets.read_manifest(checkpoint.url), checkpoint.facts()
    assert manifest is not None
    training = {
        "run": job.name,
        "kimg": f"{record.images / 1000:g}",
        "checkpoint": shown_url(checkpoint.url),
        "checkpoint_sha256": manifest.digest,
        "manifest_digest": score.protocol.reference_digest,
        "method_digest": facts.method_digest,
        "git_commit": facts.git_commit,
        **(describe(run.init) if run and run.init else {}),
    }
    tags = {
        "metric": score.key,
        score.key: repr(score.value),
        "better": "higher" if score.higher_is_better else "lower",
        "protocol": json.dumps(score.protocol.to_dict()),
        **training,
    }
    with files.temporary_folder("model") as folder:
        model.save(folder)
        grid.save(folder / "samples.png")
        (folder / "README.md").write_text(model_card(job.registry_name, model, score, training))
        version = registry.register(uri, job.registry_name, folder, run_id, tags)
    alias = registry.CHAMPION if promote_best(uri, job.registry_name) == version else None
    return RegisteredModel(model=job.registry_name, version=version, alias=alias)


def make_comparable(job: TrainJob, score: Score, scorer: Scorer) -> None:
    """Score the champion under the protocol of `score`, and store the value in the registry.

    Does nothing where the champion has this score. Does nothing where the champion cannot be compared: it generates
    images of another resolution or another number of classes, or its weights or batch-norm statistics are of another
    kind. Such a champion keeps the alias. So does a champion whose files are damaged or cannot be checked.
    """
    uri = tracking_uri(job)
    champion = registry.champion_of(uri, job.registry_name)
    if champion is None or score.key in champion.tags:
        return
    collection, device = scorer.collection, scorer.extractor.device
    try:
        model = open_model(f"models:/{job.registry_name}/{champion.number}", device, tracking_uri=uri)
    except CorruptError as error:
        log.warning("the champion cannot be compared and keeps its alias: %s", error)
        return
    images = (model.config.known_resolution, model.config.known_num_classes)
    same_images = images == (collection.resolution, collection.num_classes)
    same_kind = (model.weights, model.batch_norm) == (score.protocol.weights, score.protocol.batch_norm)
    if same_images and same_kind:
        log.info("scoring champion version %d under %s", champion.number, score.key)
        value = scorer.score(model, score.protocol).value
        if value is not None:
            registry.add_score(uri, job.registry_name, champion.number, score.key, value)
