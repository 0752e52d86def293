"""What runs and sweeps started from. It is kept as long as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.errors import CorruptError, shown_url
from pipeline.pruning.verdict import Verdict, kept
from pipeline.runs.json_records import RecordedInit
from pipeline.runs.stored_run import StoredRun, StoredStudy, StoredSweep, open_folder
from pipeline.storage import files
from pipeline.tracking.delete_version import ListedVersion, run_starts
from pipeline.tracking.init_source import location


@dataclass(frozen=True)
class Starts:
    """The sources of all runs that are known, each with the name of a run that started from it.

    Attributes:
        by_url: Runs by the URL of a registered version or a checkpoint.
        by_digest: Runs by the digest of the source, which is the same wherever the source is.
    """

    by_url: dict[str, str]
    by_digest: dict[str, str]

    @classmethod
    def read(cls, uri: str, inits: Mapping[str, RecordedInit], versions: Iterable[ListedVersion]) -> Starts:
        """Collect the sources from run folders, from the runs of the tracker and from the registered versions.

        Args:
            uri: Tracking URI.
            inits: What the runs and sweeps in storage started from, by their names.
            versions: All registered versions.

        Raises EnvironmentFault.
        """
        by_url, by_digest = {}, {}
        for source, (run, digest) in run_starts(uri).items():
            by_url[source], by_digest[digest] = run, run
        for listed in versions:
            if "init" in (tags := listed.version.tags):
                by_url[tags["init"]] = by_digest[tags.get("init_sha256", "")] = listed.uri
        for run, init in inits.items():
            by_url[shown_url(location(init.source, init.version))] = by_digest[init.sha256] = run
        by_digest.pop("", None)  # of a record without a digest
        return cls(by_url, by_digest)


@dataclass(frozen=True)
class RunFolders:
    """The folders below the root of the runs.

    Attributes:
        runs: The training runs, each with the id of its MLflow run.
        inits: What runs and sweeps started from, by their names.
        to_clone: Clones of the newest generation of each population, by the URL of the checkpoint from which a clone
            starts. A clone that has not started is no run yet.
        unreadable: Folders whose record is not valid.
    """

    runs: list[tuple[StoredRun, str]]
    inits: dict[str, RecordedInit]
    to_clone: dict[str, str]
    unreadable: list[Verdict]

    @classmethod
    def read(cls, root: str) -> RunFolders:
        """Read the records of all runs and sweeps below `root`. Raises EnvironmentFault."""
        found = cls([], {}, {}, [])
        for name in files.list_folders(root):
            url = files.join(root, name)
            try:
                folder = open_folder(url)
                record = None if folder is None or isinstance(folder, StoredStudy) else folder.record()
                generation = folder.newest_generation() if isinstance(folder, StoredSweep) else None
            except CorruptError as error:
                found.unreadable.append(kept("run", url, f"its record is not valid: {error.message}"))
                continue
            if record is None:
                continue
            if record.init is not None:
                found.inits[name] = record.init
            for member in generation.members if generation else ():
                if member.parent is not None:
                    source = StoredSweep(url).trial(member.parent.run).checkpoint(member.parent.checkpoint)
                    found.to_clone[shown_url(source.url)] = member.name
            if isinstance(folder, StoredRun):
                found.runs.append((folder, record.mlflow_run_id))
        return found
