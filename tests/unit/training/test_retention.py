"""Retention deletes the checkpoints that nobody needs."""

from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.training.retention import superfluous


def test_the_newest_and_the_protected_are_kept():
    checkpoints = [StoredCheckpoint(f"runs/a/checkpoints/{i:03}") for i in range(6)]
    assert superfluous(checkpoints, 2, {"001"}) == [checkpoints[0], checkpoints[2], checkpoints[3]]
    assert superfluous(checkpoints[:2], 2, set()) == []
