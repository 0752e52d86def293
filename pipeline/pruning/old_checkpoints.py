"""Decides which checkpoints of runs nobody needs, and deletes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.errors import CorruptError, UsageError, shown_url
from pipeline.pruning.old_versions import being_trained
from pipeline.pruning.starts import RunFolders, Starts
from pipeline.pruning.verdict import Verdict, goes, kept
from pipeline.runs.checkpoints import StoredCheckpoint, abandoned_checkpoints
from pipeline.runs.owner import claim
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import file_sets, files
from pipeline.tracking.delete_version import ListedVersion, knows_run
from pipeline.tracking.init_source import checkpoint_digest
from pipeline.training.retention import needed_by_run, superfluous


@dataclass(frozen=True)
class OldCheckpoints:
    """The checkpoints of runs, and what needs them.

    Attributes:
        uri: Tracking URI.
        folders: The runs.
        versions: The registered versions that are kept.
        starts: What runs started from.
        keep: Number of the newest checkpoints of each run that are kept, at least 1.
    """

    uri: str
    folders: RunFolders
    versions: Sequence[ListedVersion]
    starts: Starts
    keep: int

    def judge(self) -> list[Verdict]:
        """Return a verdict on each checkpoint of each run, or on the whole run where all its checkpoints are kept.

        Raises EnvironmentFault.
        """
        verdicts = list(self.folders.unreadable)
        for run, run_id in self.folders.runs:
            driver = being_trained(run)
            verdicts += [kept("run", shown_url(run.url), driver)] if driver else self._judge_run(run, run_id)
        return verdicts

    def delete(self, plan: Iterable[Verdict], note: Callable[[str], None]) -> Iterator[Verdict]:
        """Delete the checkpoints of a plan. Yield what was deleted or, against the plan, kept.

        The run is owned while its checkpoints are judged again and deleted, so that no driver trains it meanwhile. A
        driver that starts waits for the end. `note` gets lines for people. Raises EnvironmentFault.
        """
        planned = {verdict.name for verdict in plan}
        for run, run_id in self.folders.runs:
            if not any(name.startswith(shown_url(run.checkpoints_url) + "/") for name in planned):
                continue
            if driver := being_trained(run):
                yield kept("run", shown_url(run.url), driver)
                continue
            try:
                owner = claim(run.owners_url, note)
            except UsageError as error:  # its driver has just started
                yield kept("run", shown_url(run.url), error.message)
                continue
            try:
                for verdict in self._judge_run(run, run_id):
                    if verdict.goes and verdict.name in planned:
                        owner.require()
                        file_sets.remove_set(run.checkpoint(files.name(verdict.name)).url)
                    if verdict.name in planned or verdict.kind == "run":
                        yield verdict
            finally:
                owner.release()

    def _judge_run(self, run: StoredRun, run_id: str) -> list[Verdict]:
        try:
            checkpoints, needed = run.checkpoints(), needed_by_run(run)
            old, verdicts = superfluous(checkpoints, self.keep, needed.keys()), []
            for checkpoint in checkpoints:
                if checkpoint in old:
                    verdicts.append(self._judge_old(checkpoint))
                else:
                    reason = needed.get(checkpoint.name, f"one of the newest {self.keep} checkpoints")
                    verdicts.append(kept("checkpoint", shown_url(checkpoint.url), reason))
        except CorruptError as error:
            return [kept("run", shown_url(run.url), error.message)]
        for checkpoint in abandoned_checkpoints(run.checkpoints_url):
            verdicts.append(_goes(checkpoint, "its upload was not finished, and a newer checkpoint is complete"))
        if any(verdict.goes for verdict in verdicts) and not knows_run(self.uri, run_id):
            reason = (
                f"the tracker does not show its MLflow run {run_id}, and may not show the versions of the run either"
            )
            return [kept("run", shown_url(run.url), reason)]
        return verdicts

    def _judge_old(self, checkpoint: StoredCheckpoint) -> Verdict:
        """Return the verdict on a checkpoint that its run does not need. Raises CorruptError, EnvironmentFault."""
        url, manifest = shown_url(checkpoint.url), file_sets.read_manifest(checkpoint.url)
        if manifest is None:
            raise CorruptError(f"{url} has no manifest any more")
        if version := self._named.get(url) or self._named.get(manifest.digest):
            return kept("checkpoint", url, f"{version} names it")
        starts = self.starts
        if run := starts.by_url.get(url) or starts.by_digest.get(checkpoint_digest(manifest, url)):
            return kept("checkpoint", url, f"{run} started from it")
        if clone := self.folders.to_clone.get(url):
            return kept("checkpoint", url, f"{clone} starts from it")
        return _goes(checkpoint, f"older than the newest {self.keep} checkpoints; no version and no run names it")

    @cached_property
    def _named(self) -> dict[str, str]:
        """Registry URIs of the versions, by the URL and by the digest of their checkpoints."""
        tags = ("checkpoint", "checkpoint_sha256")
        return {one.version.tags[tag]: one.uri for one in self.versions for tag in tags if tag in one.version.tags}


def _goes(checkpoint: StoredCheckpoint, reason: str) -> Verdict:
    names = files.list_files(checkpoint.url)
    size = sum(files.size(files.join(checkpoint.url, name)) or 0 for name in names)
    return goes("checkpoint", shown_url(checkpoint.url), reason, size)
