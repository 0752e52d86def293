"""Layout of the folder of a run, a sweep or a study below `checkpoint.root`. No other module knows the layout."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.locations import absolute
from pipeline.config.schema import TrainJob
from pipeline.errors import CorruptError
from pipeline.runs.checkpoints import StoredCheckpoint, complete_checkpoints
from pipeline.runs.json_records import (
    GenerationRecord,
    RunRecord,
    RunState,
    ScoreRecord,
    StudyRecord,
    StudySummary,
    StudyTables,
    SweepRecord,
    SweepSummary,
    SweepTrials,
    TrainSummary,
    TrialRecord,
)
from pipeline.runs.spending import Spending
from pipeline.storage import files, validate_json

STUDIES = "studies"
"""Name of the folder of the studies, below the folder of the runs."""


@dataclass(frozen=True)
class StoredRun:
    """The folder of a training run."""

    url: str

    @classmethod
    def of(cls, job: TrainJob) -> StoredRun:
        """Return the folder of the job's run. The folder need not exist."""
        return cls(files.join(job.checkpoint.root, job.name))

    @classmethod
    def of_checkpoint(cls, url: str) -> StoredRun | None:
        """Return the folder of the run that wrote the checkpoint `url`; None where no run has such a checkpoint."""
        folder = url.rstrip("/").rpartition("/")[0]
        run = cls(folder.rpartition("/")[0])
        return run if folder == run.checkpoints_url else None

    @property
    def name(self) -> str:
        return files.name(self.url)

    @property
    def record_url(self) -> str:
        return _record_url(self.url)

    def record(self) -> RunRecord | None:
        """Return `run.json`; None where there is no run. Raises CorruptError, EnvironmentFault."""
        return RunRecord.read(self.record_url)

    def write_record(self, record: RunRecord) -> None:
        record.write(self.record_url)

    def summary(self) -> TrainSummary | None:
        """Return `summary.json`; None where the run has not ended. Raises CorruptError, EnvironmentFault."""
        return TrainSummary.read(_summary_url(self.url))

    def write_summary(self, summary: TrainSummary) -> None:
        summary.write(_summary_url(self.url))

    def state(self) -> RunState | None:
        """Return `status.json`; None where no driver has written it. Raises CorruptError, EnvironmentFault."""
        return RunState.read(self._state_url)

    def write_state(self, state: RunState) -> None:
        state.write(self._state_url)

    def counted_state(self) -> RunState | None:
        """Return `status.json`, with the device hours of `run.json` where these are more.

        None where no driver has written one of them. Raises CorruptError, EnvironmentFault.
        """
        record, state = self.record(), self.state()
        if record is None or state is None:
            return None
        return state.model_copy(update={"device_hours": max(state.device_hours, record.device_hours)})

    def spending(self) -> Spending | None:
        """Return what the run has spent; None where no driver has told it. Raises CorruptError, EnvironmentFault."""
        state = self.counted_state()
        return None if state is None else state.spending

    @property
    def _state_url(self) -> str:
        return files.join(self.url, "status.json")

    def delete(self) -> None:
        """Delete the folder with all checkpoints. Registered models have files of their own."""
        files.delete(self.url)

    @property
    def owners_url(self) -> str:
        """URL of the folder that says which driver owns the run."""
        return files.join(self.url, "owners")

    # --- checkpoints ---

    @property
    def checkpoints_url(self) -> str:
        """URL of the folder that holds the checkpoints."""
        return files.join(self.url, "checkpoints")

    def checkpoint(self, name: str) -> StoredCheckpoint:
        """Return the checkpoint of this name. The checkpoint need not exist."""
        return StoredCheckpoint(files.join(self.checkpoints_url, name))

    def checkpoints(self) -> list[StoredCheckpoint]:
        """Return the complete checkpoints, the oldest first. Raises CorruptError, EnvironmentFault."""
        return complete_checkpoints(self.checkpoints_url)

    def checkpoints_to_score(self) -> list[StoredCheckpoint]:
        """Return the complete checkpoints that should have a score: those written to be scored, and the newest."""
        complete = self.checkpoints()
        return [checkpoint for checkpoint in complete if checkpoint is complete[-1] or checkpoint.facts().to_score]

    # --- scores ---

    def score(self, checkpoint: StoredCheckpoint) -> ScoreRecord | None:
        """Return the score of a checkpoint; None where it has no score. Raises CorruptError, EnvironmentFault."""
        return ScoreRecord.read(self._score_url(checkpoint.name))

    def write_score(self, record: ScoreRecord) -> None:
        record.write(self._score_url(record.checkpoint))

    def scores(self) -> list[ScoreRecord]:
        """Return all scores of the run, the oldest first. Scores of deleted checkpoints are included.

        Raises CorruptError, EnvironmentFault.
        """
        names = sorted(files.list_names(files.join(self.url, "scores")))
        records = [ScoreRecord.read(self._score_url(name.removesuffix(".json"))) for name in names]
        return [record for record in records if record is not None]

    def _score_url(self, checkpoint: str) -> str:
        return files.join(self.url, "scores", f"{checkpoint}.json")

    # --- pictures ---

    def grid_url(self, checkpoint: str) -> str:
        """Return the URL of the sample grid of a checkpoint."""
        return files.join(self.url, "grids", f"{checkpoint}.png")

    @property
    def report_url(self) -> str:
        """URL of the page about the run. The page is written at the end of the run."""
        return files.join(self.url, "report.html")

    @property
    def animation_url(self) -> str:
        """URL of an animation of the sample grids. The animation is written at the end of the run."""
        return files.join(self.url, "grids.gif")


@dataclass(frozen=True)
class StoredSweep:
    """The folder of a sweep. The runs of its trials are beside it."""

    url: str

    @classmethod
    def of(cls, base: TrainJob, name: str) -> StoredSweep:
        """Return the folder of the sweep of this name over a base job. The folder need not exist."""
        return cls(files.join(base.checkpoint.root, name))

    @property
    def name(self) -> str:
        return files.name(self.url)

    @property
    def owners_url(self) -> str:
        return files.join(self.url, "owners")

    def record(self) -> SweepRecord | None:
        """Return `run.json`; None where there is no sweep. Raises CorruptError, EnvironmentFault."""
        return SweepRecord.read(_record_url(self.url))

    def write_record(self, record: SweepRecord) -> None:
        record.write(_record_url(self.url))

    def summary(self) -> SweepSummary | None:
        """Return `summary.json`; None where the sweep has not ended. Raises CorruptError, EnvironmentFault."""
        return SweepSummary.read(_summary_url(self.url))

    def write_summary(self, summary: SweepSummary) -> None:
        summary.write(_summary_url(self.url))

    def trials(self) -> SweepTrials | None:
        """Return `trials.json`; None where the sweep has not ended. Raises CorruptError, EnvironmentFault."""
        return SweepTrials.read(files.join(self.url, "trials.json"))

    def write_trials(self, trials: SweepTrials) -> None:
        trials.write(files.join(self.url, "trials.json"))

    def trial_url(self, name: str) -> str:
        """Return the URL of the record of a trial. It need not exist."""
        return files.join(self.url, "trials", f"{name}.json")

    def trial_records(self) -> list[TrialRecord]:
        """Return the records of the trials that have started, by number. Raises CorruptError, EnvironmentFault."""
        names = [name.removesuffix(".json") for name in files.list_names(files.join(self.url, "trials"))]
        records = [self._trial_record(name) for name in names if name.startswith(f"{self.name}-")]
        return sorted(filter(None, records), key=lambda record: (record.number, record.trial.name))

    def _trial_record(self, name: str) -> TrialRecord | None:
        url = self.trial_url(name)
        record = TrialRecord.read(url)
        if record is not None and record.trial.name != name:
            raise CorruptError(f"{url} is the record of another trial: {record.trial.name}", "delete the file")
        return record

    def write_trial_record(self, record: TrialRecord) -> None:
        record.write(self.trial_url(record.trial.name))

    def generation_url(self, number: int) -> str:
        """Return the URL of the record of a generation. It need not exist."""
        return files.join(self.url, "generations", f"{number:06d}.json")

    def newest_generation(self) -> GenerationRecord | None:
        """Return the record of the newest generation; None where there is none. Raises CorruptError, EnvironmentFault.

        Only a sweep with a population has such records.
        """
        names = [name for name in files.list_names(files.join(self.url, "generations")) if name.endswith(".json")]
        if not names:
            return None
        url = files.join(self.url, "generations", max(names))
        record = GenerationRecord.read(url)
        if record is not None and url != self.generation_url(record.number):
            raise CorruptError(f"{url} is the record of another generation: {record.number}", "delete the file")
        return record

    def write_generation(self, record: GenerationRecord) -> None:
        record.write(self.generation_url(record.number))

    @property
    def picture_url(self) -> str:
        """URL of the picture of the scores over the sweep's space."""
        return files.join(self.url, "plane.png")

    def trial(self, name: str) -> StoredRun:
        """Return the run of a trial."""
        return StoredRun(files.join(self.url.rpartition("/")[0], name))

    def delete(self) -> None:
        """Delete the folder of the sweep. The runs of its trials are kept."""
        files.delete(self.url)


@dataclass(frozen=True)
class StoredStudy:
    """The folder of a study, `<checkpoint.root>/studies/<name>/`. Its runs have folders of their own."""

    url: str

    @classmethod
    def of(cls, job: TrainJob, name: str) -> StoredStudy:
        """Return the folder of the study of this name, given a job of one of its runs. The folder need not exist."""
        return cls(files.join(job.checkpoint.root, STUDIES, name))

    @property
    def name(self) -> str:
        return files.name(self.url)

    def record(self) -> StudyRecord | None:
        """Return `run.json`; None where there is no study. Raises CorruptError, EnvironmentFault."""
        return StudyRecord.read(_record_url(self.url))

    def write_record(self, record: StudyRecord) -> None:
        record.write(_record_url(self.url))

    def summary(self) -> StudySummary | None:
        """Return `summary.json`; None where the study has not ended. Raises CorruptError, EnvironmentFault."""
        return StudySummary.read(_summary_url(self.url))

    def write_summary(self, summary: StudySummary) -> None:
        summary.write(_summary_url(self.url))

    def tables(self) -> StudyTables | None:
        """Return `tables.json`; None where the study has not ended. Raises CorruptError, EnvironmentFault."""
        return StudyTables.read(files.join(self.url, "tables.json"))

    def write_tables(self, tables: StudyTables) -> None:
        tables.write(files.join(self.url, "tables.json"))

    @property
    def table_url(self) -> str:
        """URL of the tables as CSV."""
        return files.join(self.url, "table.csv")

    @property
    def picture_url(self) -> str:
        """URL of the picture of the scores over the length of the runs."""
        return files.join(self.url, "curves.png")

    @property
    def report_url(self) -> str:
        """URL of the page about the study. The page is written at the end of the study."""
        return files.join(self.url, "report.html")

    def run(self, name: str) -> StoredRun:
        """Return a run of the study."""
        return StoredRun(files.join(self.url.rpartition("/")[0].rpartition("/")[0], name))

    def sweep(self, name: str) -> StoredSweep:
        """Return a sweep that tunes a row of the study."""
        return StoredSweep(self.run(name).url)

    def delete(self) -> None:
        """Delete the folder of the study. Its runs are kept."""
        files.delete(self.url)


def open_folder(url: str) -> StoredRun | StoredSweep | StoredStudy | None:
    """Return the run, the sweep or the study in the folder `url`; None where the folder holds none of them.

    Raises UsageError where the home folder in `url` is that of nobody. Raises CorruptError, EnvironmentFault.
    """
    # A sweep or a study finds its runs in a folder above its own, which `.` or a slash at the end would hide.
    url = absolute(url).rstrip("/")
    record_url = _record_url(url)
    try:
        record = validate_json.parse(validate_json.read(record_url), record_url, "a record of a run, sweep or study")
    except FileNotFoundError:
        return None
    if record.get("kind") == "study":
        return StoredStudy(url)
    return StoredSweep(url) if record.get("kind") == "tune" else StoredRun(url)


def _record_url(url: str) -> str:
    return files.join(url, "run.json")


def _summary_url(url: str) -> str:
    return files.join(url, "summary.json")
