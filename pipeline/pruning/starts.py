"""What runs, sweeps and studies started from. It is kept as long as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.errors import CorruptError, shown_url
from pipeline.pruning.verdict import Verdict, kept
from pipeline.runs.stored_run import STUDIES, StoredRun, StoredStudy, StoredSweep, open_folder
from pipeline.storage import files
from pipeline.tracking.delete_version import ListedVersion, run_starts
from pipeline.tracking.init_source import location


@dataclass(frozen=True)
class Starts:
    """What runs started from, each source with the name of a run, a sweep or a study that started from it.

    Attributes:
        by_url: Names by the URL of a registered version or a checkpoint.
        by_digest: Names by the digest of the source, which is the same wherever the source is.
    """

    by_url: dict[str, str] = field(default_factory=dict)
    by_digest: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, uri: str, recorded: Starts, versions: Iterable[ListedVersion]) -> Starts:
        """Collect the sources from the runs of the tracker, from the registered versions and from records in storage.

        Args:
            uri: Tracking URI.
            recorded: The sources that the records in storage name.
            versions: All registered versions.

        Raises EnvironmentFault.
        """
        found = cls()
        for source, (run, digest) in run_starts(uri).items():
            found.add(run, source, digest)
        for listed in versions:
            if "init" in (tags := listed.version.tags):
                found.add(listed.uri, tags["init"], tags.get("init_sha256"))
        found.by_url.update(recorded.by_url)
        found.by_digest.update(recorded.by_digest)
        return found

    def add(self, name: str, url: str, digest: str | None) -> None:
        """Add a source. Some records have no digest."""
        self.by_url[url] = name
        if digest:
            self.by_digest[digest] = name


@dataclass(frozen=True)
class RunFolders:
    """The folders below the root of the runs.

    Attributes:
        runs: The training runs, each with the id of its MLflow run.
        starts: What runs, sweeps and studies started from.
        to_clone: Clones of the newest generation of each population, by the URL of the checkpoint from which a clone
            starts. A clone that has not started is no run yet.
        unreadable: Folders whose record is not valid.
    """

    runs: list[tuple[StoredRun, str]] = field(default_factory=list)
    starts: Starts = field(default_factory=Starts)
    to_clone: dict[str, str] = field(default_factory=dict)
    unreadable: list[Verdict] = field(default_factory=list)

    @classmethod
    def read(cls, root: str) -> RunFolders:
        """Read the records of all runs, sweeps and studies below `root`. Raises EnvironmentFault."""
        found, studies = cls(), files.join(root, STUDIES)
        urls = [files.join(root, name) for name in files.list_folders(root) if name != STUDIES]
        for url in [*urls, *(files.join(studies, name) for name in files.list_folders(studies))]:
            try:
                if (folder := open_folder(url)) is not None:
                    found._add(folder)
            except CorruptError as error:
                found.unreadable.append(kept("run", url, f"its record is not valid: {error.message}"))
        return found

    def _add(self, folder: StoredRun | StoredSweep | StoredStudy) -> None:
        """Add the contents of a folder. Raises CorruptError, EnvironmentFault."""
        if isinstance(folder, StoredStudy):
            study = folder.record()
            for source, version in (study.init_versions if study else {}).items():
                self.starts.add(f"the study {folder.name}", shown_url(location(source, version)), None)
            return
        if isinstance(folder, StoredSweep) and (generation := folder.newest_generation()):
            parents = {member.name: member.parent for member in generation.members if member.parent is not None}
            for clone, parent in parents.items():
                cloned = folder.trial(parent.run).checkpoint(parent.checkpoint)
                self.to_clone[shown_url(cloned.url)] = clone
        if (record := folder.record()) is None:
            return
        if (init := record.init) is not None:
            self.starts.add(folder.name, shown_url(location(init.source, init.version)), init.sha256)
        if isinstance(folder, StoredRun):
            self.runs.append((folder, record.mlflow_run_id))
