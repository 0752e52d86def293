"""A score reaches the tracker, a model the registry."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config.schema import TrainJob
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.measure import Score, measure
from pipeline.evaluation.models import open_model
from pipeline.evaluation.records import ScoreRecord
from pipeline.storage import files, fileset
from pipeline.tracking import registry, source
from pipeline.tracking.card import card
from pipeline.tracking.tracker import Tracker, tracking_uri
from sagan.sampling import Model

log = logging.getLogger(__name__)

DELIVERY_S = 30.0


def log_scores(job: TrainJob, run_id: str, scored: Iterable[ScoreRecord], pictures: Iterable[Path]) -> None:
    """Offer scores and pictures to the run, which skips the values that it has.

    A tracker that is away is waited for a little and then left.
    """
    with tempfile.TemporaryDirectory(prefix="sagan-scores-") as temp:
        tracker = Tracker(tracking_uri(job), run_id)
        for record in scored:
            protocol = record.score.protocol
            values = {protocol.key(name): value for name, value in record.score.values.items()}
            tracker.log(values, record.images, record.time_ms)
            path = Path(temp) / f"{protocol.id8}.json"
            path.write_text(json.dumps(protocol.to_dict(), indent=1))
        for path in Path(temp).iterdir():
            tracker.artifact(path, "protocols")
        for path in pictures:
            tracker.artifact(path, "grids")
        tracker.close(DELIVERY_S)


def register(job: TrainJob, run_id: str, record: ScoreRecord, model: Model, picture: Image.Image) -> dict[str, Any]:
    """The registry's version of a scored checkpoint, made if need be; then `champion` goes where it belongs.

    Returns {model, version, alias}: alias is None where another version is champion. Raises EnvironmentFault.
    """
    uri, score, url = tracking_uri(job), record.score, job.folder.checkpoint(record.checkpoint)
    manifest, facts = fileset.read_manifest(url), files.read_json(files.join(url, "checkpoint.json"))
    assert manifest is not None
    key = score.protocol.key(score.key)
    training = {
        "run": job.name,
        "kimg": f"{record.images / 1000:g}",
        "checkpoint": url,
        "checkpoint_sha256": manifest.digest,
        "manifest_digest": score.protocol.reference_digest,
        "method_digest": facts["method_digest"],
        "commit": facts.get("commit", source.UNKNOWN),
    }
    tags = {
        "metric": key,
        key: repr(score.value),
        "better": "higher" if score.higher_is_better else "lower",
        "protocol": json.dumps(score.protocol.to_dict()),
        **training,
    }
    with tempfile.TemporaryDirectory(prefix="sagan-model-") as temp:
        folder = Path(temp)
        model.save(folder)
        picture.save(folder / "samples.png")
        (folder / "README.md").write_text(card(job.registry_name, model, score.summary(), training))
        version = registry.register(uri, job.registry_name, folder, run_id, tags)
    champion = registry.promote_best(uri, job.registry_name)
    alias = registry.CHAMPION if champion == version else None
    return {"model": job.registry_name, "version": version, "alias": alias}


def make_champion_comparable(job: TrainJob, score: Score, evaluator: Evaluator) -> None:
    """Score the champion of another protocol under this one, so that the better of the two can be champion.

    One that makes other images, or whose weights and statistics are of another kind, cannot be compared and stays.
    """
    uri, key = tracking_uri(job), score.protocol.key(score.key)
    champion = registry.champion_of(uri, job.registry_name)
    if champion is None or key in champion.tags:
        return
    collection, device = evaluator.collection, evaluator.extractor.device
    model = open_model(f"models:/{job.registry_name}/{champion.number}", device, tracking_uri=uri)
    same_images = (model.config.size, model.config.labels) == (collection.resolution, collection.classes)
    same_kind = (model.weights, model.batch_norm) == (score.protocol.weights, score.protocol.batch_norm)
    if same_images and same_kind:
        log.info("scoring champion version %d under %s", champion.number, key)
        value = measure(model, evaluator, score.protocol).value
        if value is not None:
            registry.add_score(uri, job.registry_name, champion.number, key, value)
