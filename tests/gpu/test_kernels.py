"""Triton's kernels compute what torch's operations compute. `TRITON_INTERPRET=1` runs this file without a GPU.

Bounds: float64 and float32 differ in the order of sums only, over up to 1 024 pixels. bfloat16 has eight bits, so a
value that is rounded once differs by up to 2⁻⁸. torch's form rounds the coefficients too.
"""

import pytest
import torch

from sagan import batch_norm, cuda_kernels, resample
from sagan.rectifier import rectifier_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}
SHAPES = [(3, 5, 4, 4), (2, 64, 6, 10), (2, 70, 32, 32), (1, 3, 2, 2)]

pytestmark = [pytest.mark.parametrize("dtype", BOUNDS, ids=str), pytest.mark.parametrize("shape", SHAPES, ids=str)]


@pytest.fixture(autouse=True)
def _plain_functions(monkeypatch):
    """The functions of batch_norm and resample use torch's operations."""
    monkeypatch.setattr(batch_norm, "kernels", lambda x: None)
    monkeypatch.setattr(resample, "kernels", lambda x: None)


def maps(shape, dtype, count):
    numbers = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=numbers) + 1 for _ in range(count)]
    return [x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last) for x in drawn]


def coefficients(shape, dtype, count):
    numbers = torch.Generator().manual_seed(1)
    kind = torch.promote_types(dtype, torch.float32)
    return [torch.randn(shape[:2], dtype=torch.float64, generator=numbers).to(DEVICE, kind) for _ in range(count)]


def same(dtype, found, expected):
    found, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.dim() < 4 or ours.is_contiguous(memory_format=torch.channels_last)
        assert (ours.double() - theirs.double()).norm() <= BOUNDS[dtype] * theirs.double().norm()


def test_image_statistics(shape, dtype):
    (x,) = maps(shape, dtype, 1)
    same(dtype, cuda_kernels.image_statistics(x), batch_norm.image_statistics(x))


@pytest.mark.parametrize("slope", [None, 0.0, 0.2])
def test_rectified_affine(shape, dtype, slope):
    (x,), (factor, offset) = maps(shape, dtype, 1), coefficients(shape, dtype, 2)
    ours = cuda_kernels.rectified_affine(x, factor, offset, slope)
    same(dtype, ours, batch_norm._rectified_affine(x, factor, offset, slope))


@pytest.mark.parametrize("slope", [None, 0.0, 0.2])
def test_gradient_sums(shape, dtype, slope):
    (x, y, dy), (mean,) = maps(shape, dtype, 3), coefficients(shape, dtype, 1)
    same(dtype, cuda_kernels.gradient_sums(x, y, dy, mean, slope), batch_norm._gradient_sums(x, y, dy, mean, slope))


def test_affine_of_two(shape, dtype):
    (x, dy), three = maps(shape, dtype, 2), coefficients(shape, dtype, 3)
    same(dtype, cuda_kernels.affine_of_two(x, dy, *three), batch_norm._affine_of_two(x, dy, *three))


@pytest.mark.parametrize("slope", [None, 0.0, 0.2])
def test_add_bias(shape, dtype, slope):
    """The kernel adds a float32 bias. torch's operations round it to the map's type first."""
    (h,), (bias, _) = maps(shape, dtype, 1), coefficients(shape, dtype, 2)
    expected = h.clone() + bias[0][:, None, None]
    expected = (expected if slope is None else torch.nn.functional.leaky_relu(expected, slope)).to(dtype)
    cuda_kernels.add_bias_(h, bias[0], slope)
    same(dtype, h, expected)


@pytest.mark.parametrize("slope", [None, 0.0, 0.2])
def test_bias_gradient(shape, dtype, slope):
    y, dy = maps(shape, dtype, 2)
    gradient = dy if slope is None else rectifier_gradient(dy, y, slope)
    sums = gradient.sum((2, 3), dtype=torch.promote_types(dtype, torch.float32))
    same(dtype, cuda_kernels.bias_gradient(y, dy, slope), (gradient, sums))


@pytest.mark.parametrize("padding", [0, 1])
def test_box(shape, dtype, padding):
    (x,) = maps(shape, dtype, 1)
    expected = torch.nn.functional.avg_pool2d(x, 2, 1, padding, divisor_override=4)
    same(dtype, cuda_kernels.box(x, padding, 4), expected)


def test_upsample(shape, dtype):
    (x,) = maps(shape, dtype, 1)
    assert torch.equal(cuda_kernels.upsample(x), resample._upsample(x))


def test_sums_of_four(shape, dtype):
    (x,) = maps(shape, dtype, 1)
    same(dtype, cuda_kernels.sums_of_four(x, 4), resample._sums_of_four(x, 4))
