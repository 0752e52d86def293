"""Triton kernels for batch norm, biases and resampling on CUDA.

torch runs every element-wise operation and every reduction as a kernel of its own, and each reads and writes its maps
in the device's memory. A kernel here does the work of three to ten of them. They compute what the functions of the same
names in `batch_norm`, `bias` and `resample` compute. All arithmetic is in float32 at least.

Maps are [b, C, H, W] in channels-last memory, that is [b, pixels, C]. A program processes tiles of pixels × channels of
one image. Offsets inside an image fit into 32 bits, offsets of images need 64.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 8192  # elements of a tile: 32 for each of 256 threads

_ACCUMULATES_IN = {torch.float64: tl.float64}  # float32 for all other types


# --- batch norm ------------------------------------------------------------------------------------------------------


def image_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance over the pixels of each image, both [b, C], for x [b, C, H, W]."""
    x = _channels_last(x)
    mean, variance = (_per_image(x) for _ in range(2))
    _image_statistics[_columns(x)](x, mean, variance, **_sizes(x))
    return mean, variance


@triton.jit
def _image_statistics(
    x, mean, variance, pixels, channels, FLOAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    image = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], FLOAT)
    for start in range(0, pixels, ROWS):
        at, inside = _addresses(image, start + tl.arange(0, ROWS), column, pixels, channels)
        total += tl.load(x + at, inside, 0.0).to(FLOAT)
    m = tl.sum(total, 0) / pixels
    total = tl.zeros([ROWS, COLUMNS], FLOAT)
    for start in range(0, pixels, ROWS):
        at, inside = _addresses(image, start + tl.arange(0, ROWS), column, pixels, channels)
        deviation = tl.load(x + at, inside, 0.0).to(FLOAT) - m[None, :]
        total += tl.where(inside, deviation * deviation, 0.0)
    tl.store(mean + image * channels + column, m, column < channels)
    tl.store(variance + image * channels + column, tl.sum(total, 0) / pixels, column < channels)


def rectified_affine(x: Tensor, factor: Tensor, offset: Tensor, slope: float | None) -> Tensor:
    """Return rectify(factor · x + offset), [b, C, H, W], for coefficients [b, C]. A slope of None rectifies nothing."""
    x = _channels_last(x)
    y = torch.empty_like(x)
    rectifier = {"SLOPE": slope or 0.0, "RECTIFIES": slope is not None}
    _rectified_affine[_tiles(x)](x, _packed(factor), _packed(offset), y, **rectifier, **_sizes(x))
    return y


@triton.jit
def _rectified_affine(
    x,
    factor,
    offset,
    y,
    pixels,
    channels,
    SLOPE: tl.constexpr,
    RECTIFIES: tl.constexpr,
    FLOAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image, _, column, at, inside = _tile_of_program(pixels, channels, ROWS, COLUMNS)
    f = _of_channels(factor + image * channels, column, channels, FLOAT)
    o = _of_channels(offset + image * channels, column, channels, FLOAT)
    value = tl.load(x + at, inside, 0.0).to(FLOAT) * f + o
    if RECTIFIES:
        value = tl.where(value > 0, value, value * SLOPE)
    tl.store(y + at, value.to(y.dtype.element_ty), inside)


def gradient_sums(x: Tensor, y: Tensor, dy: Tensor, mean: Tensor, slope: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient before the rectifier of y, [b, C, H, W], and its sums over pixels, both [b, C].

    The second sum has the factor x − mean. x, y and dy are [b, C, H, W], and `mean` is [b, C].
    """
    x, y, dy = _channels_last(x), _channels_last(y), _channels_last(dy)
    gradient = torch.empty_like(dy) if slope is not None else dy
    alone, along = (_per_image(x) for _ in range(2))
    rectifier = {"SLOPE": slope or 0.0, "RECTIFIES": slope is not None}
    _gradient_sums[_columns(x)](x, y, dy, _packed(mean), gradient, alone, along, **rectifier, **_sizes(x))
    return gradient, alone, along


@triton.jit
def _gradient_sums(
    x,
    y,
    dy,
    mean,
    gradient,
    alone,
    along,
    pixels,
    channels,
    SLOPE: tl.constexpr,
    RECTIFIES: tl.constexpr,
    FLOAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m = _of_channels(mean + image * channels, column, channels, FLOAT)
    of_gradient = tl.zeros([ROWS, COLUMNS], FLOAT)
    of_product = tl.zeros([ROWS, COLUMNS], FLOAT)
    for start in range(0, pixels, ROWS):
        at, inside = _addresses(image, start + tl.arange(0, ROWS), column, pixels, channels)
        g = tl.load(dy + at, inside, 0.0).to(FLOAT)
        if RECTIFIES:
            g = tl.where(tl.load(y + at, inside, 0.0).to(FLOAT) > 0, g, g * SLOPE)
            g = g.to(gradient.dtype.element_ty).to(FLOAT)  # the sums are those of what is stored
            tl.store(gradient + at, g.to(gradient.dtype.element_ty), inside)
        of_gradient += g
        of_product += (tl.load(x + at, inside, 0.0).to(FLOAT) - m) * g
    tl.store(alone + image * channels + column, tl.sum(of_gradient, 0), column < channels)
    tl.store(along + image * channels + column, tl.sum(of_product, 0), column < channels)


def affine_of_two(x: Tensor, dy: Tensor, x_factor: Tensor, dy_factor: Tensor, offset: Tensor) -> Tensor:
    """Return x_factor · x + dy_factor · dy + offset, [b, C, H, W], for coefficients [b, C]."""
    x, dy = _channels_last(x), _channels_last(dy)
    dx = torch.empty_like(x)
    _affine_of_two[_tiles(x)](x, dy, _packed(x_factor), _packed(dy_factor), _packed(offset), dx, **_sizes(x))
    return dx


@triton.jit
def _affine_of_two(
    x,
    dy,
    x_factor,
    dy_factor,
    offset,
    dx,
    pixels,
    channels,
    FLOAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image, _, column, at, inside = _tile_of_program(pixels, channels, ROWS, COLUMNS)
    of_x = _of_channels(x_factor + image * channels, column, channels, FLOAT)
    of_dy = _of_channels(dy_factor + image * channels, column, channels, FLOAT)
    o = _of_channels(offset + image * channels, column, channels, FLOAT)
    value = tl.load(x + at, inside, 0.0).to(FLOAT) * of_x + o
    value += tl.load(dy + at, inside, 0.0).to(FLOAT) * of_dy
    tl.store(dx + at, value.to(dx.dtype.element_ty), inside)


# --- biases ----------------------------------------------------------------------------------------------------------


def add_bias_(h: Tensor, bias: Tensor, slope: float | None) -> None:
    """Compute rectify(h + bias) in place for h [b, C, H, W] in channels-last memory and bias [C]."""
    _add_bias[_tiles(h)](h, bias, SLOPE=slope or 0.0, RECTIFIES=slope is not None, **_sizes(h))


@triton.jit
def _add_bias(
    h,
    bias,
    pixels,
    channels,
    SLOPE: tl.constexpr,
    RECTIFIES: tl.constexpr,
    FLOAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    _, _, column, at, inside = _tile_of_program(pixels, channels, ROWS, COLUMNS)
    value = tl.load(h + at, inside, 0.0).to(FLOAT)
    value += _of_channels(bias, column, channels, FLOAT)
    if RECTIFIES:
        value = tl.where(value > 0, value, value * SLOPE)
    tl.store(h + at, value.to(h.dtype.element_ty), inside)


def bias_gradient(y: Tensor, dy: Tensor, slope: float | None) -> tuple[Tensor, Tensor]:
    """Return the gradient before the rectifier of y, [b, C, H, W], and its sums over pixels, [b, C].

    y and dy are [b, C, H, W]. y is not read where `slope` is None.
    """
    y, dy = _channels_last(y), _channels_last(dy)
    gradient = torch.empty_like(dy) if slope is not None else dy
    sums = _per_image(dy)
    rectifier = {"SLOPE": slope or 0.0, "RECTIFIES": slope is not None}
    _bias_gradient[_columns(dy)](y, dy, gradient, sums, **rectifier, **_sizes(dy))
    return gradient, sums


@triton.jit
def _bias_gradient(
    y,
    dy,
    gradient,
    sums,
    pixels,
    channels,
    SLOPE: tl.constexpr,
    RECTIFIES: tl.constexpr,
    FLOAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], FLOAT)
    for start in range(0, pixels, ROWS):
        at, inside = _addresses(image, start + tl.arange(0, ROWS), column, pixels, channels)
        g = tl.load(dy + at, inside, 0.0).to(FLOAT)
        if RECTIFIES:
            g = tl.where(tl.load(y + at, inside, 0.0).to(FLOAT) > 0, g, g * SLOPE)
            g = g.to(gradient.dtype.element_ty).to(FLOAT)  # the sums are those of what is stored
            tl.store(gradient + at, g.to(gradient.dtype.element_ty), inside)
        total += g
    tl.store(sums + image * channels + column, tl.sum(total, 0), column < channels)


# --- resampling ------------------------------------------------------------------------------------------------------


def upsample(x: Tensor) -> Tensor:
    """Return the nearest upsampling ×2, [b, C, 2H, 2W], for x [b, C, H, W]."""
    x = _channels_last(x)
    b, channels, height, width = x.shape
    y = _empty_map(x, (b, channels, 2 * height, 2 * width))
    _upsample[_tiles(x)](x, y, width, **_sizes(x))
    return y


@triton.jit
def _upsample(x, y, width, pixels, channels, FLOAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    image, row, column, at, inside = _tile_of_program(pixels, channels, ROWS, COLUMNS)
    value = tl.load(x + at, inside, 0.0)
    corner = 4 * width * (row // width) + 2 * (row % width)  # the first of the four pixels
    y += image * 4 * pixels * channels
    for down in range(2):
        for right in range(2):
            to = (corner + down * 2 * width + right)[:, None] * channels + column[None, :]
            tl.store(y + to, value, inside)


def sums_of_four(x: Tensor, divisor: int) -> Tensor:
    """Return the sums over 2×2 windows at stride 2, divided by `divisor`: [b, C, H/2, W/2] for x [b, C, H, W]."""
    x = _channels_last(x)
    b, channels, height, width = x.shape
    y = _empty_map(x, (b, channels, height // 2, width // 2))
    _sums_of_four[_tiles(y)](x, y, width // 2, divisor, **_sizes(y))
    return y


@triton.jit
def _sums_of_four(
    x, y, width, divisor, pixels, channels, FLOAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    image, row, column, at, inside = _tile_of_program(pixels, channels, ROWS, COLUMNS)
    corner = 4 * width * (row // width) + 2 * (row % width)
    x += image * 4 * pixels * channels
    total = tl.zeros([ROWS, COLUMNS], FLOAT)
    for down in range(2):
        for right in range(2):
            source = (corner + down * 2 * width + right)[:, None] * channels + column[None, :]
            total += tl.load(x + source, inside, 0.0).to(FLOAT)
    tl.store(y + at, (total / divisor).to(y.dtype.element_ty), inside)


def box(x: Tensor, padding: int, divisor: int) -> Tensor:
    """Return the sums over 2×2 windows at stride 1, divided by `divisor`: [b, C, H ± 1, W ± 1] for x [b, C, H, W].

    With `padding` 1 the result is larger than x, with 0 smaller.
    """
    x = _channels_last(x)
    b, channels, height, width = x.shape
    y = _empty_map(x, (b, channels, height - 1 + 2 * padding, width - 1 + 2 * padding))
    _box[_tiles(y)](x, y, height, width, divisor, PADDING=padding, **_sizes(y))
    return y


@triton.jit
def _box(
    x,
    y,
    height,
    width,
    divisor,
    pixels,
    channels,
    PADDING: tl.constexpr,
    FLOAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image, row, column, at, inside = _tile_of_program(pixels, channels, ROWS, COLUMNS)
    side = width - 1 + 2 * PADDING
    x += image * height * width * channels
    total = tl.zeros([ROWS, COLUMNS], FLOAT)
    for down in range(2):
        for right in range(2):
            line, place = row // side + down - PADDING, row % side + right - PADDING
            exists = (line >= 0) & (line < height) & (place >= 0) & (place < width)
            source = (line * width + place)[:, None] * channels + column[None, :]
            total += tl.load(x + source, inside & exists[:, None], 0.0).to(FLOAT)
    tl.store(y + at, (total / divisor).to(y.dtype.element_ty), inside)


# --- parts of kernels ------------------------------------------------------------------------------------------------


@triton.jit
def _tile_of_program(pixels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the image, the rows and the columns of a program's tile, its elements' offsets, and which exist."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    at, inside = _addresses(image, row, column, pixels, channels)
    return image, row, column, at, inside


@triton.jit
def _addresses(image, row, column, pixels, channels):
    """Return the offsets of a tile's elements, [ROWS, COLUMNS], and which of them exist."""
    inside = (row < pixels)[:, None] & (column < channels)[None, :]
    return image * pixels * channels + row[:, None] * channels + column[None, :], inside


@triton.jit
def _of_channels(values, column, channels, FLOAT: tl.constexpr):
    """Return one value per channel, [1, COLUMNS]."""
    return tl.load(values + column, column < channels, 0.0).to(FLOAT)[None, :]


# --- sizes -----------------------------------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty_map(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _per_image(x: Tensor) -> Tensor:
    """Return a new tensor [b, C] of the type that sums have."""
    return x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))


def _packed(coefficients: Tensor) -> Tensor:
    return coefficients.contiguous()


def _sizes(x: Tensor) -> dict[str, Any]:
    """Return the sizes of maps and tiles, and the type of sums, as arguments of a kernel."""
    _, channels, height, width = x.shape
    rows, columns = _tile(height * width, channels)
    return {
        "pixels": height * width,
        "channels": channels,
        "FLOAT": _ACCUMULATES_IN.get(x.dtype, tl.float32),
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": 8,
    }


@functools.cache
def _tile(pixels: int, channels: int) -> tuple[int, int]:
    """Return the pixels and the channels of a tile, both powers of two."""
    columns = min(64, triton.next_power_of_2(channels))
    return min(_TILE // columns, triton.next_power_of_2(pixels)), columns


def _columns(x: Tensor) -> tuple[int, int]:
    """Return the grid of programs that process all pixels of an image and a tile's channels."""
    b, channels, height, width = x.shape
    _, columns = _tile(height * width, channels)
    return b, -(-channels // columns)


def _tiles(x: Tensor) -> tuple[int, int, int]:
    """Return the grid of programs that process one tile each."""
    b, channels, height, width = x.shape
    rows, columns = _tile(height * width, channels)
    return b, -(-height * width // rows), -(-channels // columns)
