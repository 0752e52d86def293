"""Decides which results that were computed from collections nobody needs, and deletes them.

Every result can be computed again as long as its collection exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipeline.collection.derived_tensors import RESULTS, stored_results
from pipeline.collection.manifest import MANIFEST, read_digest
from pipeline.errors import CorruptError, shown_url
from pipeline.pruning.verdict import Verdict, goes, kept
from pipeline.storage import file_sets, files


def judge_statistics(bucket: str, runs: str) -> list[Verdict]:
    """Return a verdict on each result beside a collection that is directly below `bucket`.

    `runs` is the name of the folder of the runs, which holds no collection. Raises EnvironmentFault.
    """
    return [
        _judge(collection, url, digest8)
        for collection in (files.join(bucket, name) for name in files.list_folders(bucket) if name != runs)
        for url, digest8 in stored_results(collection).items()
    ]


def delete_statistics(plan: Iterable[Verdict], bucket: str, runs: str) -> Iterator[Verdict]:
    """Delete the results of a plan. Yield what was deleted or, against the plan, kept. Raises EnvironmentFault."""
    planned = {verdict.name for verdict in plan}
    for name in files.list_folders(bucket) if planned else []:
        collection = files.join(bucket, name)
        if name == runs:
            continue
        for url, digest8 in stored_results(collection).items():
            if shown_url(url) not in planned:
                continue
            if (verdict := _judge(collection, url, digest8)).goes:
                file_sets.remove_set(url)
            yield verdict


def _judge(collection: str, url: str, digest8: str) -> Verdict:
    name = shown_url(url)
    try:
        digest = read_digest(collection)
    except CorruptError as error:
        return kept("statistics", name, f"its collection is damaged: {error.message}")
    if digest is not None and digest.startswith(digest8):
        return kept("statistics", name, "its collection exists")
    if digest is None and (others := set(files.list_names(collection)) - {RESULTS}):
        return kept("statistics", name, f"its collection has no {MANIFEST}, but other files: {min(others)}")
    size = sum(files.size(files.join(url, file)) or 0 for file in files.list_files(url))
    reason = "its collection is deleted" if digest is None else "its collection was packed again, with another content"
    return goes("statistics", name, reason, size)
