"""The job files' schema: every key, its type, its range, its default and what it means.

Networks and optimisers are `sagan.config`'s dataclasses, used as they are. Descriptions are shown by
`sagan config --schema`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.storage import files
from pipeline.storage.run_folder import RunFolder
from sagan.config import RESOLUTIONS, ModelConfig, OptimConfig
from sagan.step import passes


def _absolute(url: str) -> str:
    """Paths are given relative to where a command runs; workers run elsewhere."""
    return url if "://" in url or not url else str(Path(url).expanduser().absolute())


def _is_file(extractor: str) -> bool:
    return bool(Path(extractor).suffix)


Url = Annotated[str, AfterValidator(_absolute)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class PackSection(Section):
    """How a collection becomes shards."""

    source: str | dict[str, str]
    """A folder of classes, a tar of such, an official layout (ImageNet, CIFAR, Tiny ImageNet, CelebA, LSUN), WebDataset
    shards, Parquet with images, a table of path,label (TABLE#COLUMN names the label), or `digits`; at any URL. A
    mapping names the splits: {train: …, heldout: …}."""
    resolution: int = 128
    """Pixels per side after the centre crop."""
    encoding: Literal["jpeg", "png", "webp"] | None = None
    """JPEG is smallest and decodes fastest; PNG and WebP keep every pixel. Default: PNG at 32 px, else JPEG."""
    quality: int = Field(95, ge=1, le=100)
    """JPEG quality."""
    chroma: Literal["4:4:4", "4:2:0"] = "4:4:4"
    """Colour resolution of JPEG: 4:4:4 keeps all of it, 4:2:0 is smaller and decodes faster."""
    shard_images: int = Field(1000, ge=1)
    """Images per shard."""
    seed: int = 0
    """Seed of the permutation in which samples are written."""
    max_broken: int = Field(0, ge=0)
    """How many undecodable images are tolerated (each is listed)."""
    exclude: Url | None = None
    """File (URL) with the names of images to leave out, one a line, as `sagan verify` prints them."""
    index_only: bool = False
    """`source` is a folder of WebDataset shards that are right as they are: index them there, write no image."""

    @field_validator("resolution")
    @classmethod
    def _known(cls, value: int) -> int:
        if value not in RESOLUTIONS:
            raise ValueError(f"must be one of {RESOLUTIONS}")
        return value


class DataSection(Section):
    """Where the shards are and in which order they are read."""

    train: Url
    """URL of a packed collection: s3://bucket/imagenet128, a path, …"""
    split: str = "train"
    """The part of the collection to train on."""
    pack: PackSection | None = None
    """Packs `source` to `train` first where there is no collection yet."""
    flip: bool = False
    """Mirror each image with probability one half (the official code does not)."""
    lanes: int = Field(16, ge=1)
    """Parts of an epoch that are read side by side. More lanes mix better and let more workers share no shard."""
    window: int = Field(2048, ge=1)
    """Samples of a lane that are shuffled together."""
    cache: str = "~/.cache/sagan/shards"
    """Folder on each node that keeps verified shards."""
    cache_gb: float = Field(100.0, gt=0)
    """Bound of that folder, in gigabytes."""
    patience_s: float = Field(300.0, ge=0)
    """How long a worker waits for storage that fails, trying again and saying so, before the run does."""
    threads: int = Field(2, ge=1)
    """Decoding threads per worker."""
    ahead: int = Field(4, ge=1)
    """Batches decoded ahead per worker."""


class TrainSection(Section):
    """How long, in which batches, on how many workers."""

    kimg: float = Field(gt=0)
    """Length of the run in thousands of real images seen by the discriminator."""
    batch: int = Field(256, ge=2)
    """Global batch, over all workers; it never changes with their number."""
    workers: int = Field(1, ge=1)
    """Ray Train workers, one per device."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 is autocast: statistics, σ, softmax and losses stay float32."""
    micro_batch: int | None = Field(None, ge=1)
    """At most so many images of a worker are in memory at once; gradients add up to the same step. Needs
    model.batch_norm_group at most as large. Default: a worker's whole share."""
    log_kimg: float = Field(1.0, gt=0)
    """Metrics go to the tracker this often."""
    max_failures: int = Field(3, ge=-1)
    """How often dead workers are replaced before the run fails; -1: always."""


class CheckpointSection(Section):
    """What survives when machines die."""

    root: Url = Field("runs", validate_default=True)
    """URL under which every run has a folder: s3://bucket/runs, a path, …"""
    kimg: float = Field(100.0, gt=0)
    """A checkpoint this often (and at the end, and on interruption)."""
    keep: int = Field(3, ge=1)
    """The newest so many are kept, beside the best and those that registered models name."""


class EvaluateSection(Section):
    """Which score decides, and how it is taken."""

    kimg: float = Field(500.0, gt=0)
    """Every so often the newest checkpoint is scored."""
    extractor: str = "inception"
    """`inception`, another network of torch-fidelity (`vgg16`, `clip-vit-b-32`, `dinov2-vit-b-14`, …), `classifier`
    (trained once on the collection), or a TorchScript / torch.export file (URL)."""
    weights: Url | None = None
    """Weights file of a network of torch-fidelity (URL); default the published one, expected in ~/.cache/sagan: for
    `inception` weights-inception-2015-12-05-6726825d.pth."""
    download: bool = False
    """Fetch the published weights to ~/.cache/sagan where they are not there yet."""
    resize: Literal["fidelity", "clean"] = "fidelity"
    """How images reach `inception`'s 299 pixels: torch-fidelity's TensorFlow-1 bilinear, or antialiased bicubic (Parmar
    et al. 2022), whose scores are called `fid_clean` etc."""
    precision: Literal["float32", "float64"] = "float32"
    """What a network of torch-fidelity computes in; float32 is without TF32."""
    split: str = "train"
    """Real images that samples are compared with."""
    samples: int = Field(50_000, ge=2)
    """Generated images per score."""
    final_samples: int | None = Field(None, ge=2)
    """Generated images of the final score; default as many as `samples`."""
    repeats: int = Field(3, ge=1)
    """The final score is the mean, with its standard deviation, over so many ranges of samples."""
    score: str = "auto"
    """Metric that ranks checkpoints and moves `champion`; auto: the Fréchet distance of the extractor."""
    precision_recall: bool = False
    """Precision and recall too (k = 3; keeps all features in memory)."""
    generator: Literal["ema", "raw"] = "ema"
    """Which weights of a checkpoint are scored and registered: their average, or as they are."""
    standing_images: int | None = Field(4096, ge=1)
    """Images that batch norm's standing statistics are taken over; null: the running averages of training instead."""
    batch: int = Field(64, ge=1)
    """Images per forward pass; does not change any score."""
    seed: int = 0
    """Seed of latents and labels of the samples, and of the classifier."""
    workers: int = Field(1, ge=1)
    """Ray workers that generate and look at images side by side; does not change any score."""
    cpus: float = Field(1.0, ge=0)
    """CPUs of each of them; they work beside training."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of each of them."""
    grid: int = Field(64, ge=1)
    """Images in the sample grid."""

    @field_validator("extractor")
    @classmethod
    def _file_is_absolute(cls, value: str) -> str:
        return _absolute(value) if _is_file(value) else value

    @model_validator(mode="after")
    def _applies(self) -> EvaluateSection:
        if self.resize == "clean" and self.extractor != "inception":
            raise ValueError(f"evaluate.resize: clean is inception's; {self.extractor} has its own way to resize")
        if self.precision == "float64" and (self.extractor == "classifier" or self.extractor_is_file):
            raise ValueError(f"evaluate.precision: float64 is not for {self.extractor}, which computes in float32")
        return self

    @property
    def extractor_is_file(self) -> bool:
        return _is_file(self.extractor)


class TrackSection(Section):
    """Where metrics and models go."""

    uri: str | None = None
    """MLflow tracking URI; default MLFLOW_TRACKING_URI, else sqlite:///…/runs/mlflow.db where the job runs."""
    experiment: str = "sagan"
    """MLflow experiment."""
    model: Name | None = None
    """Name in the registry; default the job's name."""
    artifacts: Url | None = None
    """Artifact location of a new experiment; default <checkpoint.root>/mlflow where the URI is sqlite."""
    register_model: bool = Field(True, alias="register")
    """Register new best checkpoints and move `champion`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)


class ResourcesSection(Section):
    """What each worker gets."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU per worker where the cluster has GPUs, else CPUs."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs per worker; whole numbers become its threads."""
    env: dict[str, str] = {}
    """Environment of the workers, set before they start (allocator, NCCL, …)."""


class TrainJob(Section):
    """Train one SAGAN."""

    kind: Literal["train"] = "train"
    name: Name
    """Unique under checkpoint.root; the same name resumes."""
    seed: int = Field(0, ge=0)
    """Decides initial weights, order, latents, labels and flips."""
    data: DataSection
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    track: TrackSection = TrackSection()
    resources: ResourcesSection = ResourcesSection()

    @model_validator(mode="after")
    def _fits(self) -> TrainJob:
        if self.train.workers > self.train.batch:
            raise ValueError(
                f"train.workers is {self.train.workers}, but train.batch has only {self.train.batch} images: "
                "every worker needs at least one; use fewer workers or a larger batch"
            )
        group = self.model.batch_norm_group
        if group and self.train.batch % group:
            raise ValueError(f"model.batch_norm_group {group} does not divide train.batch {self.train.batch}")
        groups = self.train.batch // (group or self.train.batch)
        passes(self.train.batch, self.train.workers, groups, self.train.micro_batch)  # raises where it cannot be exact
        return self

    @property
    def folder(self) -> RunFolder:
        """Where the run is kept."""
        return RunFolder(files.join(self.checkpoint.root, self.name))

    @property
    def registry_name(self) -> str:
        return self.track.model or self.name


class PackJob(Section):
    """Pack a collection into shards."""

    kind: Literal["pack"] = "pack"
    name: Name
    destination: Url
    """URL of the collection to write."""
    pack: PackSection


class EvaluateJob(Section):
    """Score a model."""

    kind: Literal["evaluate"] = "evaluate"
    name: Name
    model: str
    """Registry URI (models:/NAME@ALIAS), checkpoint URL or pulled folder."""
    reference: Url
    """URL of the packed collection to compare with."""
    evaluate: EvaluateSection = EvaluateSection()
    track: TrackSection = TrackSection()


class Choice(Section):
    """Values of one key, tried at random or all (grid)."""

    choice: list[Any] | None = None
    grid: list[Any] | None = None
    loguniform: tuple[float, float] | None = None
    uniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one(self) -> Choice:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError("give exactly one of: choice, grid, loguniform, uniform")
        for kind in ("loguniform", "uniform"):
            if (bounds := given.get(kind)) and not bounds[0] < bounds[1]:
                raise ValueError(f"{kind} needs [low, high] with low < high")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs bounds above 0")
        return self

    @property
    def example(self) -> Any:
        """Some value of it, for what all values share."""
        return next(iter(self.model_dump(exclude_none=True).values()))[0]


class SearchSection(Section):
    trials: int = Field(12, ge=1)
    """How many pairs are tried (a grid is tried whole, whatever this says)."""
    at_once: int = Field(2, ge=1)
    """Trials that run side by side."""
    algorithm: Literal["optuna", "random"] = "optuna"
    first: list[dict[str, Any]] = []
    """Points that are tried first, e.g. the published pair."""
    seed: int = 0


class ScheduleSection(Section):
    """ASHA: at each rung the worse trials stop."""

    grace_kimg: float = Field(gt=0)
    """No trial is stopped before this."""
    reduction: int = Field(3, ge=2)
    """One in so many goes on at each rung."""


class TuneJob(Section):
    """Search over keys of a base job, by default the two learning rates."""

    kind: Literal["tune"] = "tune"
    name: Name
    base: str
    """Another job file, relative to this one."""
    overrides: dict[str, Any] = {}
    """Keys of the base job that differ in every trial: {train.kimg: 20}."""
    space: dict[str, Choice]
    """Key of the base job → values: {optim.lr_d: {loguniform: [1.0e-4, 1.0e-3]}}."""
    search: SearchSection = SearchSection()
    schedule: ScheduleSection | None = None

    @property
    def example(self) -> dict[str, Any]:
        """Some point of the space."""
        return {key: choice.example for key, choice in self.space.items()}


Job = TrainJob | TuneJob | PackJob | EvaluateJob
KINDS: dict[str, type[Job]] = {"train": TrainJob, "tune": TuneJob, "pack": PackJob, "evaluate": EvaluateJob}
