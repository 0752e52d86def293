"""The tensors of somebody else's file. Each is checked when it is taken, and all of the generator's must be taken."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.errors import UsageError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ForeignTensors:
    """Tensors by name that a file of a peer holds.

    Args:
        tensors: Tensors as the file's reader returned them. Nothing about them has been checked.
        source: Path or URL of the file, for messages.
        size: Size of the file in bytes. All tensors that are taken together are at most as large.
        prefix: What the file's names have before these names, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: str, size: int, prefix: str = "") -> None:
        self.source, self._prefix = source, prefix
        self._tensors, self._left, self._taken = dict(tensors), size, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names_below(self, prefix: str) -> list[str]:
        """Return the names that begin with `prefix`, without it."""
        return [name.removeprefix(prefix) for name in self._tensors if name.startswith(prefix)]

    def below(self, prefix: str) -> ForeignTensors:
        """Return the tensors whose names begin with `prefix`, by their names without it."""
        chosen = {name: self._tensors[prefix + name] for name in self.names_below(prefix)}
        return ForeignTensors(chosen, self.source, self._left, self._prefix + prefix)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """Return a tensor as float64.

        Args:
            name: Name of the tensor.
            shape: Expected shape. None stands for any length from 1.

        Raises UsageError where there is no such tensor, or its shape, its type, its size or a value is wrong.
        """
        shown = self._prefix + name
        if name not in self._tensors:
            raise UsageError(
                f"{self.source} has no tensor {shown}", "check --from, and that it is the generator's file"
            )
        tensor = self._tensors[name]
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _FLOATS:
            raise self.refusal(
                f"{shown} is a tensor of {tensor.dtype} ({tensor.layout}), not of floating-point numbers"
            )
        found = tuple(tensor.shape)
        if len(found) != len(shape) or any(n < 1 or n != (m or n) for n, m in zip(found, shape, strict=True)):
            expected = ", ".join("any" if length is None else str(length) for length in shape)
            raise self.refusal(f"{shown} has the shape {list(found)} instead of [{expected}]")
        if name not in self._taken:
            self._left -= tensor.numel() * tensor.element_size()
            self._taken.add(name)
        if self._left < 0:  # strides of zero, or one storage for many tensors
            raise self.refusal(f"{shown} and the tensors taken before it have more bytes than the file")
        values = tensor.detach().double()
        if not values.isfinite().all():
            raise self.refusal(f"{shown} has values that are not finite")
        return values

    def statistics(self, mean: str, variance: str, *shape: int) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance of a batch norm. Raises UsageError, also where a variance is negative."""
        means, variances = self.take(mean, *shape), self.take(variance, *shape)
        if variances.min() < 0:
            raise self.refusal(f"{self._prefix}{variance} has negative values")
        return means, variances

    def leave(self, pattern: str) -> None:
        """Let the tensors whose whole names match a regular expression pass. No image depends on them."""
        self._taken |= {name for name in self._tensors if re.fullmatch(pattern, name)}

    def require_all_taken(self) -> None:
        """Check that no tensor is left. Raises UsageError that names tensors which the generator has no place for."""
        if left := sorted(self._tensors.keys() - self._taken):
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            names = ", ".join(self._prefix + name for name in left[:5])
            raise self.refusal(f"sagan's generator has no place for its tensors {names}{more}")

    def is_normalised(self, layer: str) -> bool:
        """Return whether a layer has spectral norm, in one of the forms of `weight`."""
        return f"{layer}.weight_orig" in self or f"{layer}.u0" in self

    def weight(self, layer: str, *shape: int | None) -> Tensor:
        """Return the weight of a layer as its evaluation forward uses it, float64.

        The layer has one of three forms:

        - `weight` alone: no spectral norm, or folded.
        - `weight_orig`, `weight_u`, `weight_v`: torch.nn.utils.spectral_norm, which divides by σ = uᵀWv.
        - `weight`, `u0`: BigGAN-PyTorch, which runs one power iteration from u0 and divides by σ = ‖Wv‖.

        Args:
            layer: Name of the layer.
            shape: Expected shape [out, …] of the weight.

        Raises UsageError.
        """
        if f"{layer}.weight_orig" in self:
            weight = self.take(f"{layer}.weight_orig", *shape)
            matrix = weight.flatten(1)
            u, v = (self.take(f"{layer}.weight_{name}", n) for name, n in zip("uv", matrix.shape, strict=True))
            return self.divided(weight, torch.dot(u, matrix @ v), layer)
        weight = self.take(f"{layer}.weight", *shape)
        if f"{layer}.u0" not in self:
            return weight
        matrix = weight.flatten(1)
        return self.divided(weight, iterated_sigma(matrix, self.take(f"{layer}.u0", 1, len(matrix))[0]), layer)

    def divided(self, weight: Tensor, sigma: Tensor, layer: str) -> Tensor:
        """Return W / σ. Raises UsageError where σ is no spectral norm."""
        if not (sigma.isfinite() and sigma > 0):
            raise self.refusal(
                f"the spectral norm of {self._prefix}{layer} is {float(sigma):g}, but it must be above 0"
            )
        return weight / sigma

    def refusal(self, reason: str) -> UsageError:
        """Return the error that refuses the file."""
        return UsageError(f"{self.source} cannot be imported: {reason}", "check --from, or import another file")


def iterated_sigma(matrix: Tensor, u: Tensor) -> Tensor:
    """Return σ = ‖Wv‖ with v = Wᵀu / ‖Wᵀu‖, a scalar, for W [out, in] and u [out]."""
    pulled = u @ matrix
    return (matrix @ (pulled / pulled.norm())).norm()
