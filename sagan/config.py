"""Configuration of the networks and of their training. Every default of the method is defined here and nowhere else."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

RESOLUTIONS = (32, 64, 128, 256)
MOST_CLASSES = 100_000
"""Largest number of classes. ImageNet-21K has 21 841."""
# BigGAN's widest block has 2048 channels. Far more are a mistake, or a foreign configuration that takes all memory.
_MOST_CHANNELS = 2**13

# Default sizes of the feature maps that get self-attention, by resolution.
_ATTENTION = {32: (16,), 64: (32,), 128: (32,), 256: (32,)}

AttentionForm = Literal["released", "icml", "first"]
ResidualForm = Literal["residual_1x1", "residual_3x3"]
AdversarialLoss = Literal["hinge", "bce"]
Augmentation = Literal["diffaugment"]

_SEQUENCES = ("attention", "multipliers_g", "multipliers_d")
# Field, least and greatest value
_RANGES = (
    ("z_dim", 1, _MOST_CHANNELS),
    ("channels_g", 1, _MOST_CHANNELS),
    ("channels_d", 1, _MOST_CHANNELS),
    ("num_classes", 0, MOST_CLASSES),  # 0: no labels
    ("batch_norm_group", 0, 2**31),
)

# Multiples of `channels_g`, by resolution: the generator's input at 4x4, then the output of each upsampling block.
_WIDTHS_G = {
    32: (4, 4, 4, 4),
    64: (16, 8, 4, 2, 1),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
}
# Multiples of `channels_d`, by resolution: the output of each block, and whether the block halves the feature map.
_WIDTHS_D = {
    32: ((2, True), (2, True), (2, False), (2, False)),
    64: ((1, True), (2, True), (4, True), (8, True), (16, False)),
    128: ((1, True), (2, True), (4, True), (8, True), (16, True), (16, False)),
    256: ((1, True), (2, True), (4, True), (8, True), (8, True), (16, True), (16, False)),
}
# The same of the first AC-GAN, at 128 px. The generator's input has one pixel. A block of the discriminator that does
# not halve the map takes 2 off its size.
_ACGAN_G = (12, 6, 4, 3, 1)
_ACGAN_D = ((1, True), (2, False), (4, True), (8, False), (16, True), (32, False))
# The same of DCGAN, at every resolution. The generator's input has a sixteenth of the resolution.
_DCGAN_G = (8, 4, 2, 1)
_DCGAN_D = ((1, True), (2, True), (4, True), (8, True))


@dataclass(frozen=True)
class Spectral:
    """Parameters of the spectral normalisation of a layer. A layer with None instead is not normalised.

    Attributes:
        eps: smallest length that a vector is divided by.
        through_iteration: whether gradients flow through u and v (official code) or treat them as constants.
    """

    eps: float = 1e-12
    through_iteration: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of the generator and the discriminator.

    The defaults are those of the official SAGAN at 128x128 (Zhang et al. 2019 and its released code), except
    `batch_norm_group`. The official code normalises over the 64 images of each tower. The default here is the whole
    global batch.

    Raises ValueError where a value cannot describe a network.
    """

    __pydantic_config__: ClassVar[dict[str, str | bool]] = {"extra": "forbid", "use_attribute_docstrings": True}

    resolution: int | None = None
    """Pixels per side: 32, 64, 128 or 256. The default comes from the collection's manifest."""
    num_classes: int | None = None
    """Number of classes; 0 trains without labels. The default comes from the collection's manifest."""
    architecture: Literal["resnet", "dcgan", "acgan"] = "resnet"
    """Layers of both networks. resnet: the residual blocks of SAGAN. dcgan: four 5×5 convolutions at stride 2,
    transposed in the generator, with batch norm in both networks (Radford et al. 2016). acgan: the first AC-GAN, at
    128 px: batch norm in both networks, the label in the generator's input, dropout in the discriminator (Odena et al.
    2017)."""
    z_dim: int = 128
    """Length of the latent vector z ~ N(0, 1)."""
    channels_g: int = 64
    """Base width of the generator. The width of each block is a multiple of it."""
    channels_d: int = 64
    """Base width of the discriminator. The width of each block is a multiple of it."""
    multipliers_g: tuple[int, ...] | None = None
    """Multiples of `channels_g`: the input at 4x4, then the output of each block. The default depends on the
    resolution."""
    multipliers_d: tuple[int, ...] | None = None
    """Multiples of `channels_d`: the output of each block. The default depends on the resolution."""
    attention: tuple[int, ...] | None = None
    """Sizes of the feature maps that get self-attention in both networks; [] for none. The default depends on the
    resolution. For dcgan it is []. acgan has none."""
    attention_form: AttentionForm | ResidualForm = "released"
    """Form of attention. released: pooled keys and values, values of C/2 channels, an output convolution. icml: no
    pooling, values of C/8 channels, an output convolution. first: no pooling, values of C channels, no output
    convolution. residual_1x1 and residual_3x3: no attention but its controls in table 1 of the paper, residual blocks
    of two 1×1 or 3×3 convolutions with as many parameters as the released form."""
    slope_g: float = 0.0
    """Negative slope of the generator's rectifiers; 0 is ReLU."""
    slope_d: float = 0.0
    """Negative slope of the discriminator's rectifiers; 0 is ReLU."""
    thin_d: bool = False
    """Discriminator blocks after the first take the width of their input inside (SNGAN-projection). By default they
    take the width of their output."""
    condition_d: Literal["projection", "classifier"] = "projection"
    """How labels enter the discriminator. projection: the logit has a term with the embedding of the label.
    classifier: a second layer classifies the image, and both networks get its loss (AC-GAN)."""
    spectral_norm_g: bool = True
    """Spectral norm on the generator's layers. Its class tables never have it."""
    spectral_norm_d: bool = True
    """Spectral norm on the discriminator's layers, including its class embedding."""
    spectral_norm_gradient: Literal["constant", "through"] = "constant"
    """constant: gradients treat the vectors of the power iteration as constants. through: gradients flow through them
    (official code)."""
    spectral_norm_start: Literal["converged", "cold"] = "converged"
    """converged: thirty power iterations before the first step. cold: one iteration from a random vector (official
    code)."""
    spectral_norm_eps: float = 1e-12
    """Smallest vector length that the power iteration divides by."""
    batch_norm_group: int = 0
    """Images per batch-norm group; 0 makes the whole global batch one group."""
    batch_norm_eps: float = 1e-5
    """Constant that batch norm adds to variances."""
    init_gain: float = 1.0
    """Gain of the Glorot initialisation of the 3×3 convolutions in residual blocks (SNGAN-projection: √2)."""
    init_std: float | None = None
    """Standard deviation of normal initial weights in all layers (DCGAN: 0.02). By default the weights are
    Glorot-uniform."""

    def __post_init__(self) -> None:
        if self.resolution is not None and self.resolution not in RESOLUTIONS:
            raise ValueError(f"model.resolution is {self.resolution}; it must be one of {RESOLUTIONS}")
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"model.{name} is {value}; it must be from {least} to {most}")
        for name in ("spectral_norm_eps", "batch_norm_eps", "init_gain"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be above 0")
        if self.init_std is not None and not self.init_std > 0:
            raise ValueError(f"model.init_std is {self.init_std}; it must be above 0")
        for name in ("slope_g", "slope_d"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be in [0, 1)")
        for name in _SEQUENCES:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
        if self.architecture == "acgan" and (self.resolution not in (None, 128) or self.attention):
            raise ValueError(
                f"model.architecture acgan has 128 px and no attention, but model.resolution is {self.resolution} and "
                f"model.attention is {list(self.attention or ())}"
            )
        if self.resolution is not None:
            sizes = {self.first_size * 2**i for i in range(1, len(self._standard_g))}
            sizes &= {self.resolution // 2**i for i in range(1, 10)} - {4, 2, 1}
            self._check_widths(self.resolution)
            if unknown := set(self.attention or ()) - sizes:
                raise ValueError(
                    f"model.attention has {sorted(unknown)}; at {self.resolution} px the feature maps have the sizes "
                    f"{sorted(sizes)}"
                )
            self._check_attention()

    def _check_attention(self) -> None:
        """Check that every feature map with self-attention has a multiple of 8 channels. Raises ValueError."""
        attention, size = self.attention_sizes, self.known_resolution
        maps = [(self.first_size * 2**i, channels, "g") for i, channels in enumerate(self.widths_g) if i]
        for channels, halves in self.widths_d:
            size = size // 2 if halves else size
            maps += [(size, channels, "d")] if halves else []
        for size, channels, network in maps:
            if size in attention and channels % 8:
                raise ValueError(
                    f"model.channels_{network} {getattr(self, f'channels_{network}')} gives {channels} channels at the "
                    f"size {size}, where model.attention needs a multiple of 8; change model.channels_{network} or "
                    f"model.multipliers_{network}, or leave {size} out of model.attention"
                )

    def _check_widths(self, resolution: int) -> None:
        for name, table in (("multipliers_g", self._standard_g), ("multipliers_d", self._standard_d)):
            multipliers = getattr(self, name)
            if multipliers is not None and (len(multipliers) != len(table) or min(multipliers) < 1):
                raise ValueError(
                    f"model.{name} is {list(multipliers)}; at {resolution} px it must be {len(table)} numbers ≥ 1"
                )
        for name, widest in (("channels_g", max(self.widths_g)), ("channels_d", max(w for w, _ in self.widths_d))):
            if widest > _MOST_CHANNELS:
                raise ValueError(
                    f"model.{name} is {getattr(self, name)}, so the widest block has {widest} channels; "
                    f"at most {_MOST_CHANNELS} are supported"
                )

    def for_collection(self, resolution: int, num_classes: int) -> ModelConfig:
        """Return a copy with resolution, number of classes and attention filled in where they are None.

        Args:
            resolution: pixels per side of the collection's images.
            num_classes: number of classes of the collection.

        Raises ValueError where a value of this configuration differs from the collection's. `num_classes` 0 is always
        allowed.
        """
        for name, required in (("resolution", resolution), ("num_classes", num_classes)):
            value = getattr(self, name)
            if value is not None and value != required and not (name == "num_classes" and value == 0):
                raise ValueError(f"model.{name} is {value}, but the collection has {required}")
        return replace(
            self,
            resolution=resolution,
            num_classes=num_classes if self.num_classes is None else self.num_classes,
            attention=self._standard_attention(resolution) if self.attention is None else self.attention,
        )

    def _standard_attention(self, resolution: int) -> tuple[int, ...]:
        return _ATTENTION[resolution] if self.architecture == "resnet" else ()

    @property
    def _standard_g(self) -> tuple[int, ...]:
        return {"resnet": _WIDTHS_G[self.known_resolution], "dcgan": _DCGAN_G, "acgan": _ACGAN_G}[self.architecture]

    @property
    def _standard_d(self) -> tuple[tuple[int, bool], ...]:
        return {"resnet": _WIDTHS_D[self.known_resolution], "dcgan": _DCGAN_D, "acgan": _ACGAN_D}[self.architecture]

    @property
    def known_resolution(self) -> int:
        """Pixels per side. Raises ValueError where `resolution` is None."""
        if self.resolution is None:
            raise ValueError("model.resolution is not set; set it, or take it from a collection with `for_collection`")
        return self.resolution

    @property
    def known_num_classes(self) -> int:
        """Number of classes. Raises ValueError where `num_classes` is None."""
        if self.num_classes is None:
            raise ValueError("model.num_classes is not set; set it, or take it from a collection with `for_collection`")
        return self.num_classes

    @property
    def spectral(self) -> Spectral:
        """Parameters of spectral normalisation, for the layers that have it."""
        return Spectral(self.spectral_norm_eps, self.spectral_norm_gradient == "through")

    @property
    def attention_sizes(self) -> tuple[int, ...]:
        """Sizes of the feature maps that get self-attention: `attention`, or the default of the resolution."""
        return self._standard_attention(self.known_resolution) if self.attention is None else self.attention

    @property
    def has_attention(self) -> bool:
        """Whether the networks have self-attention, and not its residual controls."""
        return bool(self.attention_sizes) and not self.attention_form.startswith("residual")

    @property
    def first_size(self) -> int:
        """Size of the generator's first feature map."""
        return {"resnet": 4, "dcgan": self.known_resolution // 16, "acgan": 1}[self.architecture]

    def next_size_d(self, size: int, down: bool) -> int:
        """Return the size of the discriminator's feature map after a block. `down` is that of `widths_d`."""
        if down:
            return -(-size // 2)
        return size - 2 if self.architecture == "acgan" else size

    @property
    def widths_g(self) -> list[int]:
        """Channels of the generator: of its first feature map, then after each upsampling block."""
        return [self.channels_g * m for m in self.multipliers_g or self._standard_g]

    @property
    def widths_d(self) -> list[tuple[int, bool]]:
        """Output channels of each discriminator block, and whether the block halves the feature map."""
        multipliers = self.multipliers_d or [m for m, _ in self._standard_d]
        return [(self.channels_d * m, down) for m, (_, down) in zip(multipliers, self._standard_d, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return the values by field name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Return the configuration whose `to_dict` is `values`."""
        return cls(**values)


@dataclass(frozen=True)
class OptimConfig:
    """Configuration of the losses, of the two Adam optimisers and of the generator's moving average.

    The defaults of the optimisers are the official code's: TTUR with learning rates 4e-4 and 1e-4, and one
    discriminator update per generator update.

    Raises ValueError where a value is outside its range.
    """

    __pydantic_config__: ClassVar[dict[str, str | bool]] = {"extra": "forbid", "use_attribute_docstrings": True}

    lr_d: float = 4e-4
    """Learning rate of the discriminator."""
    lr_g: float = 1e-4
    """Learning rate of the generator."""
    beta1: float = 0.0
    """Adam's β₁."""
    beta2: float = 0.999
    """Adam's β₂."""
    eps: float = 1e-8
    """Adam's ε."""
    n_dis: int = 1
    """Discriminator updates per generator update."""
    lr_decay_kimg: tuple[float, float] | None = None
    """Two positions in thousands of images. Both learning rates fall linearly to zero between them. None: no decay."""
    loss: AdversarialLoss = "hinge"
    """Adversarial loss. hinge: that of the paper. bce: binary cross-entropy, without saturation for the generator
    (Goodfellow et al. 2014)."""
    auxiliary_weight: float = 1.0
    """Weight λ of the classification loss in both networks, where `model.condition_d` is classifier."""
    ema_decay: float = 0.999
    """Decay of the moving average per generator update. Evaluation and export use the moving average by default."""
    ema_start_kimg: float = 0.0
    """Position in thousands of images. Before it, the moving average is a copy of the generator's weights."""

    def __post_init__(self) -> None:
        for name in ("lr_d", "lr_g", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.n_dis < 1:
            raise ValueError(f"optim.n_dis is {self.n_dis}; it must be at least 1")
        if self.lr_decay_kimg is not None:
            start, end = self.lr_decay_kimg
            object.__setattr__(self, "lr_decay_kimg", (start, end))
            if not 0 <= start < end:
                raise ValueError(f"optim.lr_decay_kimg is {[start, end]}; it must be [start, end] with 0 ≤ start < end")
        for name in ("auxiliary_weight", "ema_start_kimg"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be 0 or more")

    def to_dict(self) -> dict[str, Any]:
        """Return the values by field name."""
        return asdict(self)


def passes(batch: int, ranks: int, groups: int, micro_batch: int | None) -> int:
    """Return the number of passes in which each rank processes its share of a batch.

    A pass has at most `micro_batch` images. A batch-norm group must lie inside one pass, since its statistics need all
    its images.

    Args:
        batch: size of the global batch.
        ranks: number of ranks.
        groups: number of batch-norm groups in the global batch.
        micro_batch: largest number of images of a rank in one pass; None for one pass.

    Raises ValueError where no number of passes meets both conditions.
    """
    share = -(-batch // ranks)
    if micro_batch is None or micro_batch >= share:
        return 1
    for count in range(-(-share // micro_batch), share + 1):
        if groups % (ranks * count) == 0:
            return count
    raise ValueError(
        f"a batch of {batch} on {ranks} workers cannot be split into passes of at most {micro_batch} images: its "
        f"{groups} batch-norm group(s) of {batch // groups} images would be cut; set model.batch_norm_group to at most "
        f"{micro_batch}, or leave the micro-batch out"
    )
