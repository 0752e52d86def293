from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pipeline.compute.torch_settings import configure_device, disable_tf32


def float32() -> tuple[str, str]:
    """The arithmetic of convolutions and of matrix products."""
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = float32()
    yield
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before  # type: ignore[attr-defined]


def test_on_cuda_convolutions_use_tf32_and_statistics_do_not() -> None:
    """Batch norm and the power iteration are matrix products; TF32 would leave them ten bits of mantissa."""
    configure_device(torch.device("cuda"))
    assert float32() == ("tf32", "ieee")


def test_scores_use_no_tf32_and_training_gets_it_back() -> None:
    disable_tf32()
    assert float32() == ("ieee", "ieee")
    configure_device(torch.device("cuda"))
    assert float32() == ("tf32", "ieee")
