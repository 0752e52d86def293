"""Lists what nobody needs in the registry and in the bucket, and deletes it.

Versions are deleted first, then the checkpoints that only they named, then statistics. A deletion that is interrupted
between two of them therefore leaves no version whose checkpoint is missing. The next prune deletes the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.pruning.old_checkpoints import OldCheckpoints
from pipeline.pruning.old_statistics import delete_statistics, judge_statistics
from pipeline.pruning.old_versions import delete_versions, judge_versions
from pipeline.pruning.starts import RunFolders, Starts
from pipeline.pruning.verdict import Verdict
from pipeline.storage import files
from pipeline.tracking.delete_version import all_versions

RUNS = "runs"
"""Name of the folder of the runs in a bucket."""


@dataclass(frozen=True)
class Prune:
    """A prune of a registry and a bucket.

    Attributes:
        uri: Tracking URI.
        bucket: URL of the folder that holds the collections and the folder `runs`.
        keep_versions: Number of the newest versions of each model that are kept, at least 1.
        keep_checkpoints: Number of the newest checkpoints of each run that are kept, at least 1.
    """

    uri: str
    bucket: str
    keep_versions: int = 5
    keep_checkpoints: int = 3

    def plan(self) -> list[Verdict]:
        """Return a verdict on everything. Nothing is changed. Raises EnvironmentFault, CorruptError."""
        versions, folders = all_versions(self.uri), self._folders()
        starts = Starts.read(self.uri, folders.starts, versions)
        of_versions = judge_versions(self.uri, versions, starts, self.keep_versions)
        going = {verdict.name for verdict in of_versions if verdict.goes}
        left = [listed for listed in versions if listed.uri not in going]
        of_checkpoints = OldCheckpoints(self.uri, folders, left, starts, self.keep_checkpoints).judge()
        return [*of_versions, *of_checkpoints, *judge_statistics(self.bucket, RUNS)]

    def delete(self, plan: list[Verdict], note: Callable[[str], None]) -> Iterator[Verdict]:
        """Delete what goes in a plan. Yield each thing once it is deleted or, against the plan, kept.

        Everything is judged again right before it is deleted: what somebody needs by now is kept. `note` gets lines for
        people. Raises EnvironmentFault, CorruptError.
        """
        going = [verdict for verdict in plan if verdict.goes]
        of_versions = [verdict for verdict in going if verdict.kind in ("version", "files")]
        yield from delete_versions(self.uri, of_versions, self._folders().starts)
        if of_checkpoints := [verdict for verdict in going if verdict.kind == "checkpoint"]:
            versions, folders = all_versions(self.uri), self._folders()
            starts = Starts.read(self.uri, folders.starts, versions)
            old = OldCheckpoints(self.uri, folders, versions, starts, self.keep_checkpoints)
            yield from old.delete(of_checkpoints, note)
        yield from delete_statistics([verdict for verdict in going if verdict.kind == "statistics"], self.bucket, RUNS)

    def _folders(self) -> RunFolders:
        return RunFolders.read(files.join(self.bucket, RUNS))
