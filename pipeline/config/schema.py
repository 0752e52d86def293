"""The schema of job files: type, range, default and meaning of every key.

`model` and `optim` are the dataclasses of `sagan.config`. `sagan config --schema` shows the docstrings of this module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.config.locations import NodePath, TrackingUri, Url, absolute, validator_of
from sagan.config import RESOLUTIONS, Augmentation, ModelConfig, OptimConfig, passes


def _is_file(extractor: str) -> bool:
    """Return whether `evaluate.extractor` is a file and not a name."""
    return bool(Path(extractor).suffix)


def _absolute_if_a_file(extractor: str) -> str:
    return absolute(extractor) if _is_file(extractor) else extractor


SPLIT_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
"""Names of splits. They are parts of the names of shards."""
SplitName = Annotated[str, Field(pattern=f"^{SPLIT_NAME}$")]
_OTHER_FOLDERS = ("mlflow", "studies")  # folders below `checkpoint.root` that are no runs


def _not_taken(name: str) -> str:
    if name in _OTHER_FOLDERS:
        raise ValueError(f"{name} is the name of another folder below checkpoint.root; give another name")
    return name


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
RunName = Annotated[Name, AfterValidator(_not_taken)]
# The names of the trials of a sweep are longer.
SweepName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,47}$"), AfterValidator(_not_taken)]
Seed = Annotated[int, Field(ge=0, lt=2**63 - 1)]
"""The final score uses the next seed, and files hold seeds as signed 64-bit numbers."""


class Section(BaseModel):
    """Base of all sections. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class PackSection(Section):
    """How images are packed into a collection."""

    source: str | dict[SplitName, str]
    """Path or URL of the images: a folder of class folders, a tar of class folders, a published data set in its own
    layout (ImageNet, CIFAR, Tiny ImageNet, CelebA, LSUN), WebDataset shards, Parquet files with images, or a table of
    path and label (TABLE#COLUMN names the column of labels). `digits` is scikit-learn's data set. A mapping gives one
    source per split: {train: …, heldout: …}."""
    resolution: int = 128
    """Pixels per side of the packed images: 32, 64, 128 or 256."""
    encoding: Literal["jpeg", "png", "webp"] | None = None
    """Format of the packed images. JPEG is the smallest and decodes fastest. PNG and WebP are lossless. Default: PNG at
    32 px, else JPEG."""
    quality: int = Field(95, ge=1, le=100)
    """Quality of JPEG, 1 to 100. PNG and WebP ignore it."""
    chroma: Literal["4:4:4", "4:2:0"] = "4:4:4"
    """Chroma subsampling of JPEG. 4:4:4 keeps the full colour resolution. 4:2:0 is smaller and decodes faster. PNG and
    WebP ignore it."""
    shard_images: int = Field(1000, ge=1)
    """Number of images per shard; the last shard of a split may have fewer."""
    seed: Seed = 0
    """Seed of the permutation in which the images are written, 0 or more."""
    max_broken: int = Field(0, ge=0)
    """Greatest number of broken images with which packing succeeds. Broken images are listed and left out."""
    max_pixels: int = Field(64_000_000, ge=1, le=178_000_000)
    """Greatest number of pixels of an image of the source. A larger image counts as broken before its pixels are
    decoded. Decoding takes up to 20 bytes of memory per pixel and thread."""
    exclude: Url | None = None
    """Path or URL of a file with the names of images to leave out, one per line, as `sagan verify` prints them."""
    index_only: bool = False
    """Index the WebDataset shards at `source` in place instead of packing them. Their images must be square and of one
    supported resolution. No image is written."""

    @field_validator("resolution")
    @classmethod
    def _known(cls, value: int) -> int:
        if value not in RESOLUTIONS:
            raise ValueError(f"must be one of {RESOLUTIONS}")
        return value


class DataSection(Section):
    """The collection to train on, the order of its samples, and the cache of its shards."""

    train: Url
    """Path or URL of a packed collection, for example s3://bucket/imagenet128."""
    split: str = "train"
    """Split of the collection to train on."""
    pack: PackSection | None = None
    """How to pack a collection to `data.train` before training, where it does not exist. Default: the collection must
    exist."""
    expected_classes: int | None = Field(None, ge=0)
    """Number of classes that the collection should have. `--dry-run` uses it where the collection cannot be read. A run
    takes the number of the collection."""
    flip: bool = False
    """Whether to mirror each image horizontally with probability one half. The official code does not."""
    augment: Augmentation | None = None
    """Random changes of all images that the discriminator gets, real and generated ones. diffaugment: colour,
    translation and cutout (Zhao et al. 2020), for collections of up to about ten thousand images. Default: no changes.
    The official code makes none."""
    lanes: int = Field(16, ge=1, le=65_536)
    """Number of lanes into which an epoch is cut. Each row of an epoch has one sample of every lane. More lanes mix
    samples better. Workers read separate shards where the number of workers divides the number of lanes."""
    window: int = Field(2048, ge=1, le=2**31)
    """Number of consecutive samples of a lane that are permuted together."""
    cache: NodePath = "~/.cache/sagan/shards"
    """Folder on each node for downloaded and verified shards."""
    cache_gb: float = Field(100.0, gt=0)
    """Greatest size of `data.cache` on each node, in units of 10⁹ bytes. The shard that was used longest ago is deleted
    first."""
    patience_s: float = Field(300.0, ge=0)
    """Seconds for which a worker retries a failed download before it raises an error. It prints messages meanwhile."""
    threads: int = Field(2, ge=1)
    """Number of threads per worker that decode images."""
    ahead: int = Field(16, ge=1)
    """Greatest number of batches that a worker decodes ahead of training. When no batch waits for a thread, the threads
    decode up to this number again; until then they sleep and do not disturb training."""


class TrainSection(Section):
    """Length of the run, batch size, workers and precision."""

    kimg: float = Field(gt=0, le=1e9)
    """Length of the run, in thousands of real images that the discriminator receives."""
    batch: int = Field(256, ge=2, le=2**20)
    """Number of real images per batch, over all workers. It does not depend on the number of workers."""
    workers: int = Field(1, ge=1, le=16_384)
    """Number of Ray Train workers, one per device. At most `train.batch`."""
    min_workers: int | None = Field(None, ge=1)
    """Least number of workers. A run trains with fewer than `train.workers` while no more fit into the cluster. The
    number does not change the method or the sequence of images. Default: always `train.workers`."""
    grow_after_s: float = Field(60.0, ge=0)
    """Seconds for which more workers must fit before a run with fewer than `train.workers` writes a checkpoint and
    starts again with more."""
    precision: Literal["float32", "bf16"] = "float32"
    """Precision of the networks. `bf16` uses autocast; statistics, σ, softmax and losses stay in float32."""
    micro_batch: int | None = Field(None, ge=1)
    """Greatest number of images that a worker processes in one pass. The gradients of all passes add up to the same
    step. A value below the worker's share of the batch needs a `model.batch_norm_group` from 1 to this value. Default:
    the whole share in one pass."""
    log_kimg: float = Field(1.0, gt=0)
    """Interval between logged points, in thousands of images."""
    max_failures: int = Field(3, ge=-1)
    """How often in a row failed workers are started again without a newer checkpoint before the run fails; -1: without
    limit. From the second start on, the workers wait 5 s, 10 s, … up to 5 minutes before they start."""

    @property
    def least_workers(self) -> int:
        """Least number of workers with which the run trains."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def changes_size(self) -> bool:
        """Whether the number of workers may change."""
        return self.least_workers < self.workers


class CheckpointSection(Section):
    """Where and how often checkpoints are written, and which ones are kept."""

    root: Url = Field("runs", validate_default=True)
    """Path or URL of the folder that holds a folder for each run, for example s3://bucket/runs."""
    kimg: float = Field(100.0, gt=0)
    """Interval between checkpoints, in thousands of images. A checkpoint is also written before each score, at the end,
    and when the run is interrupted."""
    keep: int = Field(3, ge=1)
    """Number of newest checkpoints that are kept. The best checkpoint, checkpoints of registered models, and
    checkpoints that wait for a score are kept as well."""


class EvaluateSection(Section):
    """How checkpoints are scored, and which score ranks them."""

    kimg: float = Field(500.0, gt=0)
    """Interval between scored checkpoints, in thousands of images. The checkpoint at `train.kimg` is always scored."""
    extractor: Annotated[str, validator_of(_absolute_if_a_file)] = "inception"
    """Network that computes features of images: `inception`, another network of torch-fidelity (`vgg16`,
    `clip-vit-b-32`, `dinov2-vit-b-14`, …), `classifier`, which is trained once on the collection, or the path or URL of
    a TorchScript (.ts) or torch.export (.pt2) file. Such a file is a program. It needs `evaluate.extractor_sha256` or
    `evaluate.trust_extractor`."""
    extractor_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 in hex of the extractor file that you trust. It is checked before the file runs."""
    trust_extractor: bool = False
    """Whether to run an extractor file without its SHA-256. The file can do all that you can do on the machine."""
    extractor_weights: Url | None = None
    """Path or URL of a file with the parameters of a network of torch-fidelity. Default: the published file in
    ~/.cache/sagan; for `inception` its name is weights-inception-2015-12-05-6726825d.pth."""
    download: bool = False
    """Whether to download the published file of `evaluate.extractor` to ~/.cache/sagan where it is missing."""
    resize: Literal["fidelity", "clean"] = "fidelity"
    """Method that resizes images for a network of torch-fidelity. `fidelity` is bilinear as in TensorFlow 1 and
    torch-fidelity. `clean` is antialiased bicubic (Parmar et al. 2022). It is available only for `inception`, and its
    scores are named `fid_clean` etc."""
    extractor_dtype: Literal["float32", "float64"] = "float32"
    """Floating-point type in which a network of torch-fidelity computes. float32 does not use TF32. `classifier` and
    files allow only float32."""
    split: str = "train"
    """Split of the real images that generated images are compared with."""
    samples: int = Field(50_000, ge=2)
    """Number of generated images per score."""
    final_samples: int | None = Field(None, ge=2)
    """Number of generated images of each repeat of the final score. Default: `evaluate.samples`. With `classifier` at
    most the number of real images."""
    repeats: int = Field(3, ge=1)
    """Number of separate sets of generated images in the final score. The score is the mean over the sets, with the
    standard deviation."""
    score: str = "auto"
    """Name of the metric that ranks checkpoints and decides about `champion`, for example `fid`. `auto` is the Fréchet
    distance of the extractor."""
    feature_metrics: bool = False
    """Whether to compute KID, precision, recall, density and coverage too. They need the features of all images in
    memory."""
    weights: Literal["ema", "raw"] = "ema"
    """Parameters of the generator that are scored and registered. `ema` is the moving average. `raw` are the parameters
    of the last step."""
    standing_images: int | None = Field(4096, ge=1, le=1_000_000)
    """Number of generated images over which the standing statistics of batch norm are computed. With null, the running
    averages of training are used."""
    batch: int = Field(64, ge=1)
    """Number of images per forward pass. It does not change a score."""
    seed: Seed = 0
    """Seed of the latents and labels of generated images, and of `classifier`; 0 or more. The final score uses the next
    seed."""
    workers: int = Field(1, ge=1)
    """Number of Ray processes that generate images and compute features in parallel. It does not change a score."""
    cpus: float = Field(1.0, ge=0)
    """Number of CPUs of each evaluation process. Where the cluster has no room for these processes beside the workers,
    training waits for each score."""
    gpus: float = Field(0.0, ge=0)
    """Number of GPUs of each evaluation process."""
    timeout_s: float = Field(21_600.0, gt=0)
    """Longest time for one score during training, in seconds. A checkpoint whose score takes longer is scored after
    training."""
    grid: int = Field(64, ge=1)
    """Greatest number of generated images in the sample grid."""

    @field_validator("gpus")
    @classmethod
    def _ray_can_reserve(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"{value:g} GPUs cannot be reserved; give a fraction of one GPU, or a whole number")
        return value

    @model_validator(mode="after")
    def _applies(self) -> EvaluateSection:
        if self.resize == "clean" and self.extractor != "inception":
            raise ValueError(f"evaluate.resize: clean needs evaluate.extractor: inception, not {self.extractor}")
        if (self.extractor_sha256 or self.trust_extractor) and not self.extractor_is_file:
            raise ValueError(
                f"evaluate.extractor_sha256 and evaluate.trust_extractor apply to a file, not to {self.extractor}"
            )
        if self.extractor_dtype == "float64" and (self.extractor == "classifier" or self.extractor_is_file):
            raise ValueError(
                f"evaluate.extractor_dtype: float64 is not available for {self.extractor}, which computes in float32"
            )
        return self

    @property
    def all_gpus(self) -> float:
        """Number of GPUs that all evaluation processes hold together."""
        return self.workers * self.gpus

    @property
    def extractor_is_file(self) -> bool:
        """Whether `extractor` is a file and not a name."""
        return _is_file(self.extractor)


class TrackSection(Section):
    """Where metrics and models are stored."""

    uri: TrackingUri | None = None
    """MLflow tracking URI. Default: the environment variable MLFLOW_TRACKING_URI, or without it the SQLite file
    runs/mlflow.db in the folder where the job runs."""
    experiment: str = "sagan"
    """Name of the MLflow experiment."""
    model: Name | None = None
    """Name of the model in the MLflow registry. Default: the name of the job."""
    artifacts: Url | None = None
    """Path or URL where a new MLflow experiment stores its artifacts. Default: <checkpoint.root>/mlflow where the
    tracking URI is an SQLite file, else the default of the MLflow server."""
    register_model: bool = Field(True, alias="register")
    """Whether to register each new best checkpoint as a model version and to update the alias `champion`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)


class InitSection(Section):
    """What a new run starts from, instead of new weights. It is part of the method of the run, by its content."""

    source: Url
    """Folder of a run, of which the newest checkpoint is taken; URL of a checkpoint; registry URI (models:/NAME@ALIAS
    or models:/NAME/VERSION); or a folder that `sagan pull` or `Model.save` wrote. It is read once, when the run
    starts."""
    networks: Literal["all", "generator", "discriminator"] = "all"
    """Networks that start from the source. `all` is both networks of a checkpoint, or the generator of a folder with a
    model. Of a registered model, `generator` is the registered generator; otherwise its checkpoint is read."""
    optimizers: bool = False
    """Whether to take the moments of Adam for these networks. They are in the checkpoints of a run."""
    ema: bool | None = None
    """Whether to take the moving average of the generator's weights. Without it, the moving average starts as a copy of
    the weights. Default: it is taken where the source has one and the run does not begin before
    `optim.ema_start_kimg`."""
    keep_position: bool = False
    """Whether the run goes on at the position of the source, which must be a checkpoint. `train.kimg` and all other
    positions then count the images of the source too. Default: the run begins at position 0."""


class ResourcesSection(Section):
    """Resources of each worker."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the workers. `auto` gives each worker a GPU where the cluster has GPUs at the run's first start, else
    CPUs. A run that is resumed keeps its device."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """Number of CPUs per worker. Rounded down, but at least 1, it is also the worker's OMP_NUM_THREADS."""
    price_per_device_hour: float | None = Field(None, ge=1e-6, le=1e9)
    """Price of a device for an hour, in a currency of your choice. A cost is a number of device hours times this price.
    Default: no costs are shown."""
    env: dict[str, str] = {}
    """Environment variables of the workers, set before they start, for example for NCCL or the allocator. Ray's
    dashboard shows them, except URLs with a password and names with SECRET, TOKEN, PASSW, CREDENTIAL, KEY or AUTH. The
    workers set those themselves."""


class BudgetSection(Section):
    """Limit of what a run spends. A run that reaches it writes a checkpoint and ends before `train.kimg`. The same
    command with a larger budget continues the run. A budget is not part of the method."""

    hours: float | None = Field(None, gt=0, le=1e9)
    """Device hours over all drivers of the run: hours of each worker, and of each GPU that scores checkpoints. Default:
    no limit."""
    cost: float | None = Field(None, gt=0, le=1e12)
    """Cost of these device hours. It needs `resources.price_per_device_hour`. Default: no limit."""


class TrainJob(Section):
    """Train one SAGAN."""

    kind: Literal["train"] = "train"
    name: RunName
    """Name of the run and of its folder below `checkpoint.root`: at most 63 lower-case letters, digits, `.`, `_` and
    `-`, first a letter or a digit. The same name resumes the run."""
    seed: Seed = 0
    """Seed of the initial parameters, the order of samples, latents, labels, flips and the parameters of
    `data.augment`."""
    data: DataSection
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    init: InitSection | None = None
    """What the run starts from. Default: new weights."""
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    track: TrackSection = TrackSection()
    resources: ResourcesSection = ResourcesSection()
    budget: BudgetSection = BudgetSection()

    @model_validator(mode="after")
    def _fits(self) -> TrainJob:
        if self.train.workers > self.train.batch:
            raise ValueError(
                f"train.workers is {self.train.workers}, but train.batch has only {self.train.batch} images: "
                "every worker needs at least one; use fewer workers or a larger batch"
            )
        if self.train.least_workers > self.train.workers:
            raise ValueError(
                f"train.min_workers is {self.train.min_workers}, which is more than train.workers, {self.train.workers}"
            )
        if self.budget.cost is not None and self.resources.price_per_device_hour is None:
            raise ValueError("budget.cost needs resources.price_per_device_hour, the price of a device for an hour")
        own = f"{self.checkpoint.root.rstrip('/')}/{self.name}"
        if self.init is not None and f"{self.init.source}/".startswith(f"{own}/"):
            raise ValueError(f"init.source {self.init.source} belongs to this run; give the new run another name")
        group = self.model.batch_norm_group
        if group and self.train.batch % group:
            raise ValueError(f"model.batch_norm_group {group} does not divide train.batch {self.train.batch}")
        self._fits_what_it_packs()
        groups = self.train.batch // (group or self.train.batch)
        for workers in range(self.train.least_workers, self.train.workers + 1):
            passes(self.train.batch, workers, groups, self.train.micro_batch)  # raises where it is impossible
        return self

    def _fits_what_it_packs(self) -> None:
        """Raise ValueError where the collection that `data.pack` makes cannot be trained on."""
        pack, wanted = self.data.pack, self.model.resolution
        if pack is None:
            return
        if not pack.index_only and wanted is None:
            replace(self.model, resolution=pack.resolution)  # raises where there is no such network
        if not pack.index_only and wanted not in (None, pack.resolution):
            raise ValueError(f"model.resolution is {wanted}, but data.pack.resolution is {pack.resolution}")
        if isinstance(pack.source, dict):
            for key, split in (("data.split", self.data.split), ("evaluate.split", self.evaluate.split)):
                if split not in pack.source:
                    raise ValueError(f"{key} is {split}, but data.pack.source has {', '.join(pack.source)}")

    @property
    def budget_hours(self) -> float | None:
        """Device hours at which the run ends: those of `budget.hours` or of `budget.cost`, whichever are fewer.

        None without a budget.
        """
        price, cost = self.resources.price_per_device_hour, self.budget.cost
        limits = [self.budget.hours, cost / price if cost is not None and price is not None else None]
        return min((hours for hours in limits if hours is not None), default=None)

    @property
    def registry_name(self) -> str:
        """Name of the model in the registry."""
        return self.track.model or self.name


class PackJob(Section):
    """Pack images into a collection."""

    kind: Literal["pack"] = "pack"
    name: Name
    """Name of the job: at most 63 lower-case letters, digits, `.`, `_` and `-`, first a letter or a digit."""
    destination: Url
    """Path or URL of the collection to write."""
    pack: PackSection


class EvaluateJob(Section):
    """Score a model."""

    kind: Literal["evaluate"] = "evaluate"
    name: Name
    """Name of the job: at most 63 lower-case letters, digits, `.`, `_` and `-`, first a letter or a digit."""
    model: Url
    """Model to score: a registry URI (models:/NAME@ALIAS), the URL of a checkpoint, or a folder that `sagan pull`
    wrote."""
    reference: Url
    """Path or URL of the packed collection whose real images the generated images are compared with."""
    evaluate: EvaluateSection = EvaluateSection()
    track: TrackSection = TrackSection()


class Choice(Section):
    """Values of one key in a sweep. Exactly one of the four keys must be given."""

    choice: list[Any] | None = Field(None, min_length=1)
    """A list of values. Each trial gets one of them."""
    grid: list[Any] | None = Field(None, min_length=1)
    """A list of values, all of which are tried. Several grids are tried in all combinations."""
    loguniform: tuple[float, float] | None = None
    """[low, high] with 0 < low < high: a number whose logarithm is uniform between the bounds."""
    uniform: tuple[float, float] | None = None
    """[low, high] with low < high: a uniform number between the bounds."""

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
        """One of the values, for checks that have the same result for every value."""
        return self.examples[0]

    @property
    def examples(self) -> list[Any]:
        """Values that stand for all values in checks: those of a list, or both bounds and a number between them."""
        if bounds := self.loguniform or self.uniform:
            low, high = bounds
            return [low, low + (high - low) / math.pi, high]
        return (self.grid if self.grid is not None else self.choice) or []

    def value_of(self, given: Any) -> Any:
        """Return a given value as this space has it. Raises ValueError where it is not a value of this space."""
        if bounds := self.loguniform or self.uniform:
            try:
                value = float(given)
            except (TypeError, ValueError):
                value = math.nan
            if isinstance(given, bool) or not bounds[0] <= value <= bounds[1]:
                raise ValueError(f"{given!r} is not a number from {bounds[0]} to {bounds[1]}")
            return value
        values = self.grid if self.grid is not None else self.choice or []
        for value in values:
            if value == given and isinstance(value, bool) == isinstance(given, bool):
                return value
        raise ValueError(f"{given!r} is not one of {values}")


def point_in(space: Mapping[str, Choice], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a point, or a part of one, with values as a space has them. Raises ValueError that names the key."""
    point = {}
    for key, value in given.items():
        if key not in space:
            raise ValueError(f"{key} is not a key of the space")
        try:
            point[key] = space[key].value_of(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return point


def _require_one_protocol(space: Mapping[str, Choice], place: str) -> None:
    """Raise ValueError where trials would be scored in different ways, and could not be compared."""
    for key in space:
        if key == "data.train" or key.startswith("evaluate."):
            raise ValueError(f"{place}.{key}: scores of trials with different values of {key} cannot be compared")


def _require_in_space(space: Mapping[str, Choice], points: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where an initial point is not in a space."""
    for i, point in enumerate(points):
        try:
            point_in(space, point)
        except ValueError as error:
            raise ValueError(f"search.initial_points.{i}: {error}") from None


class SearchSection(Section):
    """Number of trials, and the algorithm that chooses their points."""

    trials: int = Field(12, ge=1)
    """Number of trials. A larger number adds trials to a sweep that exists. The number is ignored where the space has a
    grid: each combination of the grids is then tried once. With `schedule.pbt`, it is the size of the population, which
    does not change."""
    max_concurrent: int = Field(2, ge=1)
    """Greatest number of trials that run at the same time. The cluster must be able to hold them. While other jobs use
    it, fewer run."""
    algorithm: Literal["optuna", "random"] = "optuna"
    """Search algorithm: `optuna` is Optuna's TPE, `random` draws points at random. A space with a grid and
    `schedule.pbt` always use `random`."""
    initial_points: list[dict[str, Any]] = []
    """Points that are tried first, by dotted key: [{optim.lr_d: 4.0e-4, optim.lr_g: 1.0e-4}]. They must be in the
    space. Keys that a point lacks are drawn."""
    seed: Seed = 0
    """Seed of the search algorithm and of the decisions of `schedule.pbt`."""


class PbtSection(Section):
    """Population-based training (Jaderberg et al. 2017). `search.trials` is the size of the population.

    Every member trains for a generation. Then each of the worst members ends, and a clone of one of the best members
    takes its place. The clone starts from the checkpoint at the end of the generation, at a point near that of its
    parent. Every member trains to `train.kimg` of the base job in this way."""

    interval_kimg: float = Field(gt=0)
    """Length of a generation, in thousands of images. The last generation ends at `train.kimg` and may be longer."""
    fraction: float = Field(0.2, gt=0, le=0.5)
    """Fraction of the population that is replaced after a generation, and fraction that is cloned. At least one member
    is replaced. A member without a score is always replaced."""
    resample: float = Field(0.25, ge=0, le=1)
    """Probability with which a value of a clone is drawn anew from the space. Otherwise, a number is multiplied by one
    of `factors`, and a value of a list is replaced by one of its neighbours in the list."""
    factors: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.8, 1.2)
    """The two factors. A product outside the space becomes the nearest bound."""


class ScheduleSection(Section):
    """How the trials of a sweep depend on each other: by ASHA (`grace_kimg`) or by population-based training (`pbt`).

    ASHA (Li et al. 2020) stops the worse trials early, at positions called rungs."""

    grace_kimg: float | None = Field(None, gt=0)
    """ASHA: position of the first rung, in thousands of images. No trial is stopped before it."""
    reduction: int = Field(3, ge=2)
    """ASHA: reduction factor. At each rung one in this many trials continues."""
    pbt: PbtSection | None = None
    """Population-based training."""

    @model_validator(mode="after")
    def _one(self) -> ScheduleSection:
        if (self.grace_kimg is None) == (self.pbt is None):
            raise ValueError("give either grace_kimg, for ASHA, or pbt")
        return self


class TuneJob(Section):
    """Search over keys of a base job, for example the two learning rates."""

    kind: Literal["tune"] = "tune"
    name: SweepName
    """Name of the sweep: at most 48 lower-case letters, digits, `.`, `_` and `-`, first a letter or a digit. The same
    name resumes the sweep."""
    base: str
    """Path of the training job that every trial runs, relative to this file."""
    overrides: dict[str, Any] = {}
    """Values that replace those of the base job in every trial, by dotted key: {train.kimg: 20}."""
    space: dict[str, Choice] = Field(min_length=1)
    """Values to search, by dotted key of the base job: {optim.lr_d: {loguniform: [1.0e-4, 1.0e-3]}}."""
    search: SearchSection = SearchSection()
    schedule: ScheduleSection | None = None
    """When trials are stopped early, or cloned. Default: every trial runs to its end."""

    @model_validator(mode="after")
    def _in_the_space(self) -> TuneJob:
        _require_one_protocol(self.space, "space")
        _require_in_space(self.space, self.search.initial_points)
        return self

    @model_validator(mode="after")
    def _is_a_population(self) -> TuneJob:
        if self.pbt is None:
            return self
        if self.search.trials < 2:
            raise ValueError(f"search.trials is {self.search.trials}; a population has at least 2 members")
        for key, choice in self.space.items():
            if not key.startswith("optim.") or key == "optim.n_dis":
                raise ValueError(f"space.{key}: with schedule.pbt, the space has only keys of optim, without n_dis")
            if choice.grid is not None:
                raise ValueError(f"space.{key}: with schedule.pbt, give `choice` instead of `grid`")
        return self

    @property
    def pbt(self) -> PbtSection | None:
        """Population-based training; None for another sweep."""
        return None if self.schedule is None else self.schedule.pbt

    def point_of(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return a point, or a part of one, with values as the space has them. Raises ValueError that names the key."""
        return point_in(self.space, given)

    @property
    def example(self) -> dict[str, Any]:
        """One point of the space, for checks that have the same result for every point."""
        return {key: choice.example for key, choice in self.space.items()}


class Published(Section):
    """A value that somebody else has published."""

    metric: str
    """Name of the metric: one of `compare.metrics`."""
    value: float
    """The published value."""
    source: str = Field(min_length=1)
    """Where it is published, for example `Zhang et al. 2019, table 1`."""
    protocol: str = Field(min_length=1)
    """How it was computed: number of images, reference images, extractor, which checkpoint."""


_OF_THE_STUDY = {"name": "rows", "seed": "seeds", "train.kimg": "kimg"}  # keys of a run and the keys that set them


class StudyTuning(Section):
    """Nuisance parameters of a row, such as learning rates. A sweep chooses them before the runs of the row."""

    space: dict[str, Choice] = Field(min_length=1)
    """Values to search, by dotted key of the row's job: {optim.lr_d: {loguniform: [1.0e-4, 1.0e-3]}}."""
    search: SearchSection = SearchSection()
    schedule: ScheduleSection | None = None
    """When trials are stopped early. Default: every trial runs to its end."""
    kimg: float | None = Field(None, gt=0, le=1e9)
    """Length of each trial, in thousands of images. Default: the length of the row's runs."""
    seed: Seed = 1000
    """Seed of the trials. It must not be one of `seeds`: the runs of the table do not repeat the trials that chose."""

    @model_validator(mode="after")
    def _in_the_space(self) -> StudyTuning:
        _require_free(self.space, "tune.space")
        _require_one_protocol(self.space, "tune.space")
        _require_in_space(self.space, self.search.initial_points)
        if self.schedule is not None and self.schedule.pbt is not None:
            raise ValueError(
                "tune.schedule: pbt changes the values while a trial trains, and the runs of a row keep theirs; give "
                "grace_kimg, or leave schedule out"
            )
        return self


class StudyRow(Section):
    """One row of a study: a training job, and what is published about it."""

    base: str | None = None
    """Path of the row's training job, relative to this file. Default: `base` of the study."""
    overrides: dict[str, Any] = {}
    """Values that replace those of the base job, by dotted key: {model.attention: [8]}. They come after `overrides` of
    the study."""
    kimg: float | None = Field(None, gt=0, le=1e9)
    """Length of each run, in thousands of images. Default: `kimg` of the study."""
    tune: StudyTuning | None = None
    """Parameters that a sweep chooses for this row. Default: `tune` of the study."""
    published: list[Published] = []
    """Published values, at most one for each metric. The table shows them beside the row's own values."""


class CompareSection(Section):
    """What a study compares."""

    metrics: list[str] = Field(min_length=1)
    """Names of metrics as scores have them: fid, isc, fd_classifier, …. Each gets a table for each score protocol."""
    reference: Name
    """Name of the row that the other rows are compared with."""
    score: Literal["final", "best", "last"] = "final"
    """Score of a run that enters the table. `final`: the final score of the best checkpoint, with other latents.
    `best`: the best score during training. `last`: the score at the end."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Confidence of the bootstrap intervals."""


class StudyJob(Section):
    """Train rows of jobs with several seeds each, and compare their scores in a table."""

    kind: Literal["study"] = "study"
    name: Name
    """Name of the study: at most 63 lower-case letters, digits, `.`, `_` and `-`, first a letter or a digit. Its runs
    are named STUDY-ROW-SEED. The same name continues the study."""
    base: str
    """Path of the training job of the rows, relative to this file."""
    overrides: dict[str, Any] = {}
    """Values that replace those of the base job in every row, by dotted key: {evaluate.samples: 10000}."""
    kimg: float | None = Field(None, gt=0, le=1e9)
    """Length of each run, in thousands of images. Default: `train.kimg` of the row's job."""
    seeds: list[Seed] = Field(min_length=1)
    """Seeds of the runs of each row. More seeds continue a study."""
    max_concurrent: int | None = Field(None, ge=1)
    """Greatest number of runs that train at the same time. Default: as many as fit into the cluster."""
    tune: StudyTuning | None = None
    """Parameters that a sweep chooses for each row, before its runs are trained. The runs get the values of the best
    trial. Default: the values of the row's job."""
    rows: dict[Name, StudyRow] = Field(min_length=1)
    """Rows of the table, by name. More rows continue a study."""
    compare: CompareSection

    @model_validator(mode="after")
    def _consistent(self) -> StudyJob:
        if self.compare.reference not in self.rows:
            raise ValueError(
                f"compare.reference: {self.compare.reference} is not a row; the rows are {', '.join(self.rows)}"
            )
        for key, values in (("seeds", self.seeds), ("compare.metrics", self.compare.metrics)):
            if twice := _twice(values):
                raise ValueError(f"{key}: {twice[0]} occurs twice")
        _require_free(self.overrides, "overrides")
        for name, row in self.rows.items():
            _require_free(row.overrides, f"rows.{name}.overrides")
            if (tuning := self.tuning(name)) and tuning.seed in self.seeds:
                raise ValueError(f"tune.seed {tuning.seed} is one of seeds; give the trials of {name} another seed")
            metrics = [published.metric for published in row.published]
            if twice := _twice(metrics):
                raise ValueError(f"rows.{name}.published: {twice[0]} occurs twice")
            if unknown := [metric for metric in metrics if metric not in self.compare.metrics]:
                raise ValueError(f"rows.{name}.published: {unknown[0]} is not one of compare.metrics")
        return self

    def tuning(self, row: str) -> StudyTuning | None:
        """Return how the parameters of a row are chosen; None where its job gives them."""
        return self.rows[row].tune or self.tune


def _twice(values: list[Any]) -> list[Any]:
    """Return the values that occur more than once."""
    return [value for value in values if values.count(value) > 1]


def _require_free(overrides: Mapping[str, Any], key: str) -> None:
    """Raise ValueError where overrides set a key that the study itself sets."""
    for taken, instead in _OF_THE_STUDY.items():
        if taken in overrides:
            raise ValueError(f"{key}: {taken} is set by the study; remove it and use `{instead}`")


Job = TrainJob | TuneJob | StudyJob | PackJob | EvaluateJob
KINDS: dict[str, type[Job]] = {
    "train": TrainJob,
    "tune": TuneJob,
    "study": StudyJob,
    "pack": PackJob,
    "evaluate": EvaluateJob,
}
