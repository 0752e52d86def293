"""Scores one model against a collection, for `sagan evaluate` and for jobs of kind evaluate."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection, EvaluateJob
from pipeline.errors import UsageError
from pipeline.evaluation.scorer import open_scorer
from pipeline.runs.score_protocol import Score
from pipeline.tracking.open_model import open_model


class ModelScore(BaseModel):
    """Result of a job of kind evaluate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["evaluate"] = "evaluate"
    name: str
    model: str
    score: Score


def evaluate_model(job: EvaluateJob) -> ModelScore:
    """Score the job's model against its collection. Raises UsageError, EnvironmentFault, CorruptError."""
    section, collection = job.evaluate, Collection.open(job.reference)
    model = open_model(job.model, tracking_uri=job.track.uri, section=section)
    if model.config.known_resolution != collection.resolution:
        raise UsageError(
            f"the model generates images of {model.config.known_resolution} px, but {collection.url} holds images of "
            f"{collection.resolution} px",
            "compare the model with a collection of the model's resolution",
        )
    with open_scorer(section, collection, DataSection(train=job.reference), section.seed) as scorer:
        score = scorer.score(model, scorer.protocol(model, seed=section.seed, samples=section.samples))
    return ModelScore(name=job.name, model=job.model, score=score)
