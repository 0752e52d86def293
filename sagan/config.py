"""What a network and its training are. Every default of the method stands here and nowhere else."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

from sagan.spectral_norm import Spectral

RESOLUTIONS = (32, 64, 128, 256)

# Feature-map size that gets self-attention unless a job says otherwise.
_ATTENTION = {32: (16,), 64: (32,), 128: (32,), 256: (32,)}

AttentionForm = Literal["released", "icml", "first"]

_SEQUENCES = ("attention", "multipliers_g", "multipliers_d")

# Multiples of `channels_g`: the generator's input at 4x4, then the output of each upsampling block.
_WIDTHS_G = {
    32: (4, 4, 4, 4),
    64: (16, 8, 4, 2, 1),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
}
# Multiples of `channels_d`: the output of each block; the flag says whether the block halves the feature map.
_WIDTHS_D = {
    32: ((2, True), (2, True), (2, False), (2, False)),
    64: ((1, True), (2, True), (4, True), (8, True), (16, False)),
    128: ((1, True), (2, True), (4, True), (8, True), (16, True), (16, False)),
    256: ((1, True), (2, True), (4, True), (8, True), (8, True), (16, True), (16, False)),
}


@dataclass(frozen=True)
class ModelConfig:
    """The pair of networks.

    Defaults are the official SAGAN at 128x128 (Zhang et al. 2019 and its released code), but for `batch_norm_group`:
    the official code normalised over the 64 images of each tower, here the default is the whole global batch.

    Raises ValueError where a value cannot make a network.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    resolution: int | None = None
    """Pixels per side: 32, 64, 128 or 256. From the collection's manifest unless given."""
    classes: int | None = None
    """Number of classes; 0 trains without labels. From the collection's manifest unless given."""
    z_dim: int = 128
    """Length of the latent vector z ~ N(0, 1)."""
    channels_g: int = 64
    """Width c of the generator; each block has a multiple of it."""
    channels_d: int = 64
    """Width c of the discriminator."""
    multipliers_g: tuple[int, ...] | None = None
    """Multiples of `channels_g`: the input at 4x4, then the output of each block. Default by resolution."""
    multipliers_d: tuple[int, ...] | None = None
    """Multiples of `channels_d`: the output of each block. Default by resolution."""
    attention: tuple[int, ...] | None = None
    """Sizes of the feature maps that get self-attention, in both networks; [] for none. Default by resolution."""
    attention_form: AttentionForm = "released"
    """released: pooled keys and values, values of C/2, output convolution. icml: no pooling, values of C/8, output
    convolution. first: no pooling, values of C, no output convolution."""
    slope_g: float = 0.0
    """Negative slope of the generator's rectifiers; 0 is ReLU."""
    slope_d: float = 0.0
    """Negative slope of the discriminator's rectifiers."""
    thin_d: bool = False
    """Discriminator blocks as wide inside as their input (SNGAN-projection) instead of their output."""
    spectral_norm_g: bool = True
    """Spectral norm on the generator's layers; never on its class tables."""
    spectral_norm_d: bool = True
    """Spectral norm on the discriminator's layers, its class embedding included."""
    spectral_norm_gradient: Literal["constant", "through"] = "constant"
    """Gradients hold the power iteration's vectors constant, or flow through them (official code)."""
    spectral_norm_start: Literal["converged", "cold"] = "converged"
    """Before the first step: thirty power iterations, or one from a random vector (official code)."""
    spectral_norm_eps: float = 1e-12
    """Least length that the power iteration divides by."""
    batch_norm_group: int = 0
    """Images per batch-norm group; 0 takes statistics over the whole global batch."""
    batch_norm_eps: float = 1e-5
    """Added to variances."""
    init_gain: float = 1.0
    """Gain of the Glorot initialisation of the blocks' 3×3 convolutions (SNGAN-projection: √2)."""

    def __post_init__(self) -> None:
        if self.resolution is not None and self.resolution not in RESOLUTIONS:
            raise ValueError(f"model.resolution is {self.resolution}; it must be one of {RESOLUTIONS}")
        for name, least in (("z_dim", 1), ("channels_g", 1), ("channels_d", 1), ("batch_norm_group", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("spectral_norm_eps", "batch_norm_eps", "init_gain"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("slope_g", "slope_d"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.classes is not None and self.classes < 0:
            raise ValueError(f"model.classes is {self.classes}; it must be 0 (no labels) or more")
        for name in _SEQUENCES:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
        if self.resolution is not None:
            possible = {4 * 2**i for i in range(1, len(_WIDTHS_G[self.resolution]))}
            possible &= {self.resolution // 2**i for i in range(1, 10)} - {4, 2, 1}
            self._check_multipliers(self.resolution)
            if wrong := set(self.attention or ()) - possible:
                raise ValueError(
                    f"model.attention has {sorted(wrong)}; at {self.resolution} px feature maps are {sorted(possible)}"
                )

    def _check_multipliers(self, resolution: int) -> None:
        for name, table in (("multipliers_g", _WIDTHS_G[resolution]), ("multipliers_d", _WIDTHS_D[resolution])):
            given = getattr(self, name)
            if given is not None and (len(given) != len(table) or min(given) < 1):
                raise ValueError(
                    f"model.{name} is {list(given)}; at {resolution} px it must be {len(table)} numbers ≥ 1"
                )

    def for_collection(self, resolution: int, classes: int) -> ModelConfig:
        """The configuration with what the collection decides filled in.

        Raises ValueError where a given value differs from the collection's. `classes: 0` is always allowed.
        """
        for name, theirs in (("resolution", resolution), ("classes", classes)):
            ours = getattr(self, name)
            if ours is not None and ours != theirs and not (name == "classes" and ours == 0):
                raise ValueError(f"model.{name} is {ours}, but the collection has {theirs}")
        return replace(
            self,
            resolution=resolution,
            classes=classes if self.classes is None else self.classes,
            attention=_ATTENTION[resolution] if self.attention is None else self.attention,
        )

    @property
    def size(self) -> int:
        """Resolution of a configuration that is complete."""
        if self.resolution is None:
            raise ValueError("model.resolution is not known yet: give it, or take it from a collection")
        return self.resolution

    @property
    def labels(self) -> int:
        """Number of classes of a configuration that is complete."""
        if self.classes is None:
            raise ValueError("model.classes is not known yet: give it, or take it from a collection")
        return self.classes

    @property
    def spectral(self) -> Spectral:
        """How the layers that are normalised are normalised."""
        return Spectral(self.spectral_norm_eps, self.spectral_norm_gradient == "through")

    @property
    def attention_sizes(self) -> tuple[int, ...]:
        return _ATTENTION[self.size] if self.attention is None else self.attention

    @property
    def widths_g(self) -> list[int]:
        """Channels at 4x4, then after each upsampling block."""
        return [self.channels_g * m for m in self.multipliers_g or _WIDTHS_G[self.size]]

    @property
    def widths_d(self) -> list[tuple[int, bool]]:
        """(channels, downsamples) of each block."""
        standard = _WIDTHS_D[self.size]
        multipliers = self.multipliers_d or [m for m, _ in standard]
        return [(self.channels_d * m, down) for m, (_, down) in zip(multipliers, standard, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        return cls(**values)


@dataclass(frozen=True)
class OptimConfig:
    """Two Adams and the average of the generator. Defaults are the official code's (TTUR 4e-4 / 1e-4, 1:1).

    Raises ValueError for values outside their ranges.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    lr_d: float = 4e-4
    """Learning rate of the discriminator."""
    lr_g: float = 1e-4
    """Learning rate of the generator."""
    beta1: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8
    n_dis: int = 1
    """Discriminator updates per generator update."""
    lr_decay_kimg: tuple[float, float] | None = None
    """Both learning rates fall linearly to zero between these two positions, in thousands of images."""
    ema_decay: float = 0.999
    """Decay, per generator update, of the average that is evaluated and exported."""
    ema_start_kimg: float = 0.0
    """Before this many thousand images the average is a copy of the generator."""

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
        if self.ema_start_kimg < 0:
            raise ValueError(f"optim.ema_start_kimg is {self.ema_start_kimg}; it must be 0 or more")

    def lr_factor(self, images: int) -> float:
        """What both learning rates are multiplied with in the step that starts at `images`."""
        if self.lr_decay_kimg is None:
            return 1.0
        start, end = self.lr_decay_kimg
        return min(1.0, max(0.0, (end - images / 1000) / (end - start)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
