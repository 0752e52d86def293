"""The fields of run.json, summary.json and the other JSON files of runs, sweeps and checkpoints."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pipeline.config.run_method import completed
from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.errors import CorruptError, shown_url
from pipeline.runs.score_protocol import Score, ScoreProtocol
from pipeline.runs.spending import Amount, Spending
from pipeline.storage import files, validate_json
from pipeline.storage.validate_json import PlainName, Sha256, Size

RUNNING, FINISHED, STOPPED_EARLY = "running", "finished", "stopped early"
"""Outcomes of a trial that did not fail."""


Method = Annotated[dict[str, Any], AfterValidator(completed)]
"""The method of a run or a sweep, by dotted key. A record of older code gets the keys that were added later."""


Seconds = Annotated[float, Field(ge=0, le=2**40, allow_inf_nan=False)]
"""Unix time in seconds."""


class Record(BaseModel):
    """A JSON file in storage. It is always written as a whole. Somebody else may have written it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 2

    @classmethod
    def read(cls, url: str) -> Self | None:
        """Return the record at `url`; None where there is no such file. Raises CorruptError, EnvironmentFault."""
        try:
            return cls.parse(validate_json.read(url), url)
        except FileNotFoundError:
            return None

    @classmethod
    def parse(cls, data: bytes, url: str) -> Self:
        """Return the record in the JSON text `data`. `url` is named in messages.

        Raises CorruptError where `data` is not such a record. The message names the wrong field.
        """
        what = f"a {cls.__name__}"
        values = validate_json.parse(data, url, what)
        version = values.get("format", 1)
        known = cls.model_fields["format"].default
        if version != known:
            raise CorruptError(
                f"{url} has format {str(version)[:20]}; this version reads format {known}",
                "use the version of sagan that wrote the file, or give the run another name",
            )
        return validate_json.validate(cls, values, url, what)

    def write(self, url: str) -> None:
        """Write the record to `url`. Raises EnvironmentFault."""
        files.write_json(url, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a dict of JSON values."""
        return self.model_dump(mode="json")


class RecordedData(BaseModel):
    """The images of a run. A reader of the record decides about the cache and everything else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str
    """URL of the collection, without user, password and query."""
    split: str

    @classmethod
    def of(cls, section: DataSection) -> RecordedData:
        return cls(train=shown_url(section.train), split=section.split)


class RecordedEvaluation(BaseModel):
    """How the checkpoints of a run were scored. A reader of the record decides about files and everything else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    extractor: str
    """Name of the extractor, or the name of its file without the folder. A reader never opens this file."""
    resize: Literal["fidelity", "clean"]
    extractor_dtype: Literal["float32", "float64"]
    split: str
    samples: Size = Field(ge=2)
    seed: int = Field(ge=0, lt=2**63)
    weights: Literal["ema", "raw"]
    standing_images: int | None = Field(ge=1, le=1_000_000)

    @classmethod
    def of(cls, section: EvaluateSection) -> RecordedEvaluation:
        values = {name: getattr(section, name) for name in cls.model_fields}
        return cls(**{**values, "extractor": files.name(shown_url(section.extractor))})


class RecordedInit(BaseModel):
    """What a run started from. A reader of the record decides where it reads anything."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    """`init.source` of the job, without user, password and query."""
    version: PlainName | None
    """Name of the checkpoint in the folder of a run, or number of a registered version; None for another source."""
    sha256: Sha256
    """Digest of the state or the model that was taken."""
    taken: list[str]
    """One line for each part that the run took."""
    skipped: list[str]
    """One line for each part that it did not take, or that is new."""


class RunRecord(Record):
    """`run.json` of a training run: facts that a later driver and later readers need."""

    kind: Literal["train"] = "train"
    name: str
    method: Method
    """All values that decide the numbers of the run, by dotted key."""
    mlflow_run_id: str
    earlier_mlflow_run_ids: list[str] = []
    """Ids of MLflow runs that did not exist any more when the run was resumed, the oldest first."""
    starts: Size = 0
    """Number of worker-group starts."""
    images_lost: Size = 0
    """Number of images that were trained on and were in no checkpoint when workers died."""
    device_hours: Amount = 0.0
    """Device hours that the run had held at the newest start or checkpoint, over all drivers."""
    device: Literal["cpu", "cuda"] | None = None
    """Device on which the run trains; None before it has started."""
    data: RecordedData
    evaluate: RecordedEvaluation
    init: RecordedInit | None = None
    """What the run started from; None where it started from new weights."""
    format: int = 3


class Wait(BaseModel):
    """Something that a part of a run waits for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    who: str
    """The part of the run."""
    what: str
    """What it waits for."""
    until: str
    """What ends the wait."""
    since_s: Seconds
    """Unix time of its beginning."""

    @property
    def line(self) -> str:
        """The wait as one line for people."""
        since = datetime.fromtimestamp(self.since_s, UTC)
        return f"{self.who} waits for {self.what}, since {since:%H:%M:%S} UTC; {self.until}"


class RunState(Record):
    """`status.json` of a training run: what its driver knew when it wrote the file.

    The file is replaced while the run trains, at most every two seconds and at least every 30 seconds. The next driver
    reads what the run has spent, and nothing else that decides about the run.
    """

    owner: Size
    """Number of the driver as the run's owner."""
    state: Literal["starting", "training", "scoring", "finished", "stopped", "failed"]
    images: Size
    """Position of the run."""
    kimg: float = Field(gt=0, allow_inf_nan=False)
    """Position at which the run ends, in thousands of images."""
    images_per_s: float | None = Field(None, allow_inf_nan=False)
    """Speed of training at the last log; None before it."""
    waits: list[Wait] = []
    restarts: Size = 0
    images_lost: Size = 0
    device_hours: Amount = 0.0
    """Device hours that the run has held, over all drivers."""
    device_s_per_image: Amount | None = None
    """Device seconds that an image took, over the logs of the last driver that logged; None before the first log."""
    price_per_device_hour: Amount | None = None
    budget_hours: Amount | None = None
    """Device hours at which the run ends; None without a budget."""
    last_error: str | None = None
    """Last error of a worker or of a driver."""
    last_error_s: Seconds | None = None
    """Unix time of the last error."""
    time_s: Seconds
    """Unix time at which the driver knew this."""

    @property
    def spending(self) -> Spending:
        """What the run has spent and is expected to spend."""
        left = max(0.0, 1000 * self.kimg - self.images)
        return Spending.of(self.device_hours, left, self.device_s_per_image, self.price_per_device_hour)


class SweepRecord(Record):
    """`run.json` of a sweep."""

    kind: Literal["tune"] = "tune"
    name: str
    mlflow_run_id: str
    earlier_mlflow_run_ids: list[str] = []
    """Ids of MLflow runs that did not exist any more when the sweep was resumed, the oldest first."""
    method: Method
    """All values that determine the trials and their results, by dotted key. The number of trials is not among them."""
    init: RecordedInit | None = None
    """What the trials started from; None where they started from new weights."""
    format: int = 3


class CheckpointFacts(Record):
    """`checkpoint.json`: facts about a checkpoint that its training state does not hold."""

    images: Size
    """Position of the run."""
    train_seconds: float
    """Seconds of training up to this position, including scores on rank 0 and checkpoints."""
    to_score: bool
    """Whether the checkpoint is due for a score."""
    collection_digest: str
    class_names: list[str]
    method_digest: str
    git_commit: str
    """Git commit of the training code."""


class ScoreRecord(Record):
    """`scores/<checkpoint>.json`: the score of one checkpoint. It is replaced where the protocol has changed."""

    checkpoint: PlainName
    """Name of the checkpoint."""
    images: Size
    """Position of the checkpoint."""
    score: Score
    seconds: float
    """Seconds that scoring took."""
    time_ms: Size
    """Unix time of the score in milliseconds, for the tracker."""


class RegisteredModel(BaseModel):
    """A version in the model registry. `alias` is None where another version is the champion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    version: int
    alias: str | None


class RunScores(Record):
    """Results of the evaluation of a run. A value that does not exist is None."""

    score: Score | None = None
    """Best score under the ranking protocol."""
    final: Score | None = None
    """Independent score of the same checkpoint, with other latents."""
    class_accuracy: float | None = None
    """Share of 1 000 samples that the extractor assigns to their own class, in [0, 1]."""
    fd_classifier: float | None = None
    """Fréchet distance between samples and training images in the features of the classifier."""
    fd_classifier_real: float | None = None
    """Fréchet distance between held-out and training images in the features of the classifier."""
    registered: RegisteredModel | None = None
    grid: str | None = None
    """URL of the sample grid."""
    checkpoint: str | None = None
    """URL of the best checkpoint."""


class TrainSummary(RunScores):
    """`summary.json` of a training run that has ended."""

    kind: Literal["train"] = "train"
    name: str
    images: Size
    """Position at the end."""
    seconds: float
    """Seconds of training, including scores on rank 0 and checkpoints."""
    images_per_s: float | None
    mlflow_run_id: str
    resumed_from: str | None
    """Name of the last checkpoint from which workers resumed; None where none did."""
    restarts: Size
    images_lost: Size
    device_hours: Amount = 0.0
    """Device hours that the run has held, over all drivers."""
    cost: Amount | None = None
    """Cost of these device hours; None without a price."""

    @property
    def spending(self) -> Spending:
        """What the run has spent. Nothing more is expected."""
        hours, cost = self.device_hours, self.cost
        return Spending(device_hours=hours, expected_device_hours=hours, cost=cost, expected_cost=cost)


class Lineage(BaseModel):
    """Where a clone in a population comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: PlainName
    """Name of the run that was cloned."""
    checkpoint: PlainName
    """Name of the checkpoint of this run from which the clone started."""
    generation: Size = Field(ge=1)
    """Number of the generation in which the clone began, from 0."""


class Trial(BaseModel):
    """Result of one trial of a sweep."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: PlainName
    """Name of the trial's run."""
    point: dict[str, Any]
    """Value of each key of the sweep's space."""
    score: float | None
    """Last score of the trial; None where its images were not finite or where it failed."""
    kimg: float = Field(ge=0)
    """Position of the last report."""
    outcome: str
    """`running`, `finished`, `stopped early`, or the reason of the failure."""
    parent: Lineage | None = None
    """What the trial was cloned from; None where it was not cloned."""


class TrialRecord(Record):
    """`trials/<name>.json` of a sweep. It is written when the trial starts, and again when it ends.

    In a population, it is also written at the end of each generation of the trial.

    A later driver needs only these records to continue the search.
    """

    number: int = Field(strict=True, ge=0, lt=2**31)
    """Number of the trial in its sweep, from 0. The point of a trial that is drawn depends on it."""
    ended: bool = Field(strict=True)
    """Whether the trial has a result. A trial that has not ended is resumed by the next driver, also after an error."""
    trial: Trial


class Member(BaseModel):
    """One trial of a population in one generation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: PlainName
    """Name of the trial's run."""
    point: dict[str, Any]
    """Value of each key of the sweep's space."""
    parent: Lineage | None
    """What the trial was cloned from, in this generation or an earlier one; None where it was not cloned."""


class GenerationRecord(Record):
    """`generations/<number>.json` of a sweep: the population in one generation.

    It is written once, before a member of the generation trains. It is the decision about which trials go on and which
    are cloned.
    """

    number: Size
    """Number of the generation, from 0."""
    members: list[Member] = Field(min_length=2, max_length=100_000)


class SweepTrials(Record):
    """`trials.json` of a sweep."""

    trials: list[Trial]


class SweepSummary(RunScores):
    """`summary.json` of a sweep that has ended."""

    kind: Literal["tune"] = "tune"
    name: str
    trials: Size
    """Number of trials."""
    stopped_early: Size
    """Number of trials that were stopped early."""
    best: Trial
    mlflow_run_id: str
    picture: str
    """Path or URL of the picture of the score over the space."""
    device_hours: Amount = 0.0
    """Device hours of all trials."""
    cost: Amount | None = None
    """Cost of these device hours; None without a price."""


Finite = Annotated[float, Field(allow_inf_nan=False)]


class StudyRecord(Record):
    """`run.json` of a study."""

    kind: Literal["study"] = "study"
    name: str
    mlflow_run_id: str
    earlier_mlflow_run_ids: list[str] = []
    """Ids of MLflow runs that did not exist any more when the study was resumed, the oldest first."""
    runs: list[PlainName] = Field([], max_length=100_000)
    """Names of the runs, in the order of training."""
    diverged: dict[PlainName, str] = {}
    """Runs whose training diverged, by name, each with the message. They have ended and are not trained again."""
    init_versions: dict[str, PlainName | None] = {}
    """Version from which all runs with an `init.source` start, by the source without user, password and query; None for
    a source without versions. They were found when the study first met the source."""
    tuned: dict[PlainName, dict[str, Any]] = {}
    """Values that the sweep of a row chose for its runs, by name of the row and dotted key."""


class Interval(BaseModel):
    """An interval of numbers with both ends."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: Finite
    high: Finite

    def holds(self, value: float) -> bool:
        """Return whether a value lies in the interval."""
        return self.low <= value <= self.high


class PublishedValue(BaseModel):
    """A published value beside a row's own values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: Finite
    source: str
    protocol: str
    held: bool | None
    """Whether the interval of the row's mean holds the value; None where there is no interval."""
    difference: Finite | None
    """Difference to the published value of the reference row; None unless both have one source and one protocol."""
    difference_held: bool | None
    """Whether the interval of the row's difference holds the published difference; None where either is missing."""


class StudyRowResult(BaseModel):
    """One row of a study under one metric and one score protocol."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    row: PlainName
    values: dict[PlainName, Finite]
    """Score of each run, by the run's seed."""
    diverged: Size
    """Number of runs that diverged and have no score."""
    mean: Finite | None
    """Mean over the runs; None where no run has a score."""
    deviation: Finite | None
    """Sample standard deviation over the runs; None for fewer than two."""
    interval: Interval | None
    """Bootstrap interval of the mean; None for fewer than two runs."""
    difference: Finite | None
    """Mean difference to the reference row over the seeds that both have; None without such seeds and for the reference
    row itself."""
    pairs: Size
    """Number of seeds that both have."""
    difference_interval: Interval | None
    """Paired bootstrap interval of the difference; None for fewer than two pairs."""
    published: PublishedValue | None
    device_hours: Amount = 0.0
    """Device hours of the row's runs."""
    cost: Amount | None = None
    """Cost of these device hours; None where a run has no price."""


class StudyTable(BaseModel):
    """Scores of a study under one metric and one protocol."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    protocol: ScoreProtocol
    higher_is_better: bool
    reference: str
    """Name of the reference row."""
    score: Literal["final", "best", "last"]
    """Which score of a run is compared."""
    confidence: float = Field(gt=0, lt=1)
    """Confidence of the intervals."""
    rows: list[StudyRowResult]

    @property
    def key(self) -> str:
        """Name of the metric under the protocol: `fid/3fa9c1d2`."""
        return self.protocol.key(self.metric)


class StudyTables(Record):
    """`tables.json` of a study."""

    tables: list[StudyTable]


class StudySummary(Record):
    """`summary.json` of a study that has ended."""

    kind: Literal["study"] = "study"
    name: str
    runs: Size
    """Number of runs that have ended."""
    diverged: Size
    """Number of runs among them that diverged."""
    images: Size
    """Number of images over all runs."""
    shown: PlainName | None
    """Name of a run of the reference row, which the page about the study shows; None where all of them diverged."""
    tuned: dict[PlainName, dict[str, Any]] = {}
    """Values that the sweep of a row chose for its runs, by name of the row and dotted key."""
    mlflow_run_id: str
    table: str
    """Path of the tables as CSV."""
    picture: str
    """Path of the picture of the scores over the length of the runs."""
    device_hours: Amount = 0.0
    """Device hours of all runs."""
    cost: Amount | None = None
    """Cost of these device hours; None without a price."""
