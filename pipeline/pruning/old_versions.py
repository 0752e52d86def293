"""Decides which registered versions nobody needs, and deletes them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from pipeline.errors import CorruptError, EnvironmentFault
from pipeline.pruning.starts import Starts
from pipeline.pruning.verdict import Kind, Verdict, goes, kept
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.owner import look_at_owner
from pipeline.runs.stored_run import StoredRun
from pipeline.tracking import delete_version
from pipeline.tracking.delete_version import ListedVersion


def judge_versions(uri: str, versions: Sequence[ListedVersion], starts: Starts, keep: int) -> list[Verdict]:
    """Return a verdict on each registered version, and on the files that an interrupted deletion has left.

    Args:
        uri: Tracking URI.
        versions: All versions of all models.
        starts: What runs started from.
        keep: Number of the newest versions of each model that are kept, at least 1.

    Raises EnvironmentFault.
    """
    newest, shared = _newest(versions, keep), _shared(versions)
    verdicts = []
    for listed in versions:
        reason = f"one of the newest {keep} versions" if listed in newest else None
        if reason := needed_by(listed, starts, shared) or reason or _needed_by_its_run(listed):
            verdicts.append(kept("version", listed.uri, reason))
        else:
            reason = f"older than the newest {keep} versions; no alias and no run names it"
            verdicts.append(_sized(uri, "version", listed.uri, reason, listed.model_id or ""))
    for model_id in delete_version.interrupted_deletions(uri):
        reason = "its version was deleted, and then the deletion was interrupted"
        verdicts.append(_sized(uri, "files", model_id, reason, model_id))
    return verdicts


def needed_by(listed: ListedVersion, starts: Starts, shared: Counter[str]) -> str | None:
    """Return who or what needs a version whatever its age; None where nobody does.

    `shared` counts the versions by the id of their logged model, and by the version that they are a copy of.
    """
    if listed.aliases:
        return f"alias {', '.join(listed.aliases)}"
    if run := starts.by_url.get(listed.uri):
        return f"{run} started from it"
    if shared[listed.uri] or (listed.model_id and shared[listed.model_id] > 1):
        return "another version has the same files"
    if not listed.version.ready:
        return "it is not READY"
    if listed.model_id is None or not {"checkpoint", "checkpoint_sha256"} <= listed.version.tags.keys():
        return "no run of sagan registered it"
    return None


def delete_versions(uri: str, plan: Iterable[Verdict], recorded: Starts) -> Iterator[Verdict]:
    """Delete the versions and files of a plan. Yield what was deleted or, against the plan, kept.

    The registry and the tracker are asked again before each deletion. A version that somebody needs by now is kept.
    `recorded` is what the records in storage name as sources. Raises EnvironmentFault, CorruptError.
    """
    for verdict in plan:
        if verdict.kind == "files":
            if verdict.name in delete_version.interrupted_deletions(uri):
                delete_version.delete_files(uri, verdict.name)
                yield verdict
            continue
        versions = {listed.uri: listed for listed in delete_version.all_versions(uri)}
        if (listed := versions.get(verdict.name)) is None:
            continue  # somebody else has deleted it
        starts = Starts.read(uri, recorded, versions.values())
        reason = needed_by(listed, starts, _shared(versions.values())) or _needed_by_its_run(listed)
        if reason is None:
            aliases = delete_version.aliases_of(uri, listed)  # again, right before the deletion
            reason = f"alias {', '.join(aliases)}" if aliases else None
        if reason is not None:
            yield kept("version", listed.uri, reason)
            continue
        delete_version.delete_version(uri, listed)
        yield verdict


def _needed_by_its_run(listed: ListedVersion) -> str | None:
    """Return why the run of a version needs it, and None where it does not.

    A run that cannot be read may need its versions.
    """
    tags = listed.version.tags
    try:
        run = StoredRun.of_checkpoint(tags["checkpoint"])
        if run is not None and (driver := being_trained(run)):
            return driver
        if "withdrawn" in tags and StoredCheckpoint(tags["checkpoint"]).is_complete():
            return "it is withdrawn: without this mark, its checkpoint could become champion again"
    except EnvironmentFault as fault:
        return f"its run cannot be read: {fault.message}"
    return None


def being_trained(run: StoredRun) -> str | None:
    """Return who trains a run; None where nobody does. Raises EnvironmentFault."""
    owner = look_at_owner(run.owners_url)
    return f"process {owner.pid} on {owner.host} trains {run.name}" if owner is not None and owner.alive else None


def _sized(uri: str, kind: Kind, name: str, reason: str, model_id: str) -> Verdict:
    """Return the verdict that a version or its files go, with their size. Odd files are kept."""
    try:
        return goes(kind, name, reason, delete_version.size_of_files(uri, model_id))
    except CorruptError as error:
        return kept(kind, name, error.message)


def _newest(versions: Iterable[ListedVersion], keep: int) -> list[ListedVersion]:
    """Return the newest READY versions of each model."""
    by_name = defaultdict(list)
    for listed in versions:
        if listed.version.ready:
            by_name[listed.name].append(listed)
    return [listed for of_model in by_name.values() for listed in of_model[-keep:]]


def _shared(versions: Iterable[ListedVersion]) -> Counter[str]:
    """Count the versions by the id of their logged model, and by the version that they are a copy of."""
    return Counter(listed.model_id or listed.source for listed in versions)
