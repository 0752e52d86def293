"""Rows of a served model are checked, without a server."""

from __future__ import annotations

from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import pytest
from mlflow.exceptions import MlflowException

from pipeline.tracking.served_model import Generator
from sagan.config import ModelConfig, OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model


def served(num_classes: int) -> Generator:
    networks = ModelConfig(resolution=32, num_classes=num_classes, z_dim=16, channels_g=4, channels_d=4)
    generator = Generator()
    generator.model = Model.from_state(TrainState(networks, OptimConfig(), 0), standing_images=32)
    return generator


@pytest.mark.parametrize(
    "row",
    [
        {"class": 10**5000},
        {"class": 10**8},
        {"seed": 2.0**60},
        {"seed": [1]},
        {"truncation": "much"},
        {"truncation": float("-inf")},
        {"truncation": -1},
        {"truncation": True},
        {"colour": 1},
    ],
)
def test_a_row_that_means_nothing_is_refused_with_its_reason(row: dict[str, Any]) -> None:
    generator = served(3)
    with pytest.raises(MlflowException) as refused:
        generator.predict(None, pd.DataFrame({key: pd.Series([value], dtype=object) for key, value in row.items()}))
    assert refused.value.error_code == "INVALID_PARAMETER_VALUE"
    assert next(iter(row)) in refused.value.message
    assert len(refused.value.message) < 300


def test_edges_are_accepted() -> None:
    rows = pd.DataFrame({"class": [2, "0", 1.0], "seed": [0, 2**63 - 1, 2**53], "truncation": [10.0, 1e-9, None]})
    assert served(3).predict(None, rows)["class"].tolist() == ["2", "0", "1"]


def test_a_model_without_classes_refuses_one() -> None:
    assert served(0).predict(None, pd.DataFrame(index=range(2)))["class"].tolist() == ["", ""]
    with pytest.raises(MlflowException, match="without classes"):
        served(0).predict(None, pd.DataFrame({"class": [0]}))
