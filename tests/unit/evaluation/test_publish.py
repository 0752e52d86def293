from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.schema import TrainJob
from pipeline.data.index import Collection
from pipeline.evaluation import evaluate
from pipeline.evaluation.protocol import Protocol
from pipeline.storage import files, fileset
from pipeline.tracking import registry


@pytest.mark.parametrize(("told", "commit"), [({"commit": "cd" * 20}, "cd" * 20), ({}, "unknown")])
def test_a_version_says_by_what_it_came_to_be(
    told: dict[str, str],
    commit: str,
    job: TrainJob,
    run_id: str,
    checkpoint: Callable[..., str],
    digits: Collection,
    tmp_path: Path,
) -> None:
    url = recommitted(checkpoint(2000), told)
    values = evaluate.score_checkpoint(job, url, run_id)
    (version,) = registry.versions(job.track.uri or "", job.name)
    tags = dict(version.tags)
    protocol = Protocol(**json.loads(tags.pop("protocol")))
    manifest = fileset.read_manifest(url)
    assert manifest is not None
    assert tags == {
        "metric": f"fd_classifier/{protocol.id8}",
        f"fd_classifier/{protocol.id8}": repr(values["fd_classifier"]),
        "better": "lower",
        "run": job.name,
        "kimg": "2",
        "checkpoint": url,
        "checkpoint_sha256": manifest.digest,
        "manifest_digest": digits.digest,
        "method_digest": "ab" * 32,
        "commit": commit,
    }
    pulled = registry.pull(job.track.uri or "", f"models:/{job.name}@champion", tmp_path / "pulled")
    assert f"| commit | {commit} |" in (pulled / "README.md").read_text()


def recommitted(url: str, facts: dict[str, str]) -> str:
    """The same checkpoint with more facts."""
    known = files.read_json(f"{url}/checkpoint.json")
    (Path(url) / "checkpoint.json").write_text(json.dumps(known | facts))
    Path(url, "manifest.json").unlink()
    fileset.commit(Path(url), url)
    return url
