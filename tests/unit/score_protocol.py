"""The protocol of the scores in unit tests."""

from __future__ import annotations

from pipeline.runs.score_protocol import ScoreProtocol

PROTOCOL = ScoreProtocol(
    extractor="x",
    extractor_digest="ab" * 32,
    resize="none",
    reference_digest="cd" * 32,
    split="train",
    samples=100,
    seed=0,
    weights="ema",
    batch_norm="standing 64",
)
