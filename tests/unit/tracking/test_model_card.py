from __future__ import annotations

from collections.abc import Sequence

import pytest
from markdown_it import MarkdownIt

from pipeline.runs.score_protocol import Score
from pipeline.tracking.model_card import model_card
from sagan.config import ModelConfig, OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model
from tests.unit.score_protocol import PROTOCOL

NAMES = [f"name {i}" for i in range(12)]


def card_of(weights: str, standing_images: int | None, num_classes: int = 12, hostile: Sequence[str] = ()) -> str:
    """The card of an untrained model, as one line without Markdown's line breaks."""
    config = ModelConfig(resolution=32, num_classes=num_classes, z_dim=16, channels_g=8, channels_d=8)
    names = [*hostile, *NAMES][:num_classes]
    state = TrainState(config, OptimConfig(), seed=0)
    model = Model.from_state(state, weights=weights, standing_images=standing_images, class_names=names)
    protocol = PROTOCOL.model_copy(update={"weights": model.weights, "batch_norm": model.batch_norm})
    score = Score.of(protocol, "fd_x", False, {"fd_x": 12.345678})
    return " ".join(model_card("some-name", model, score, {"kimg": "2", "git_commit": "unknown"}).split())


def test_the_card_of_raw_weights_with_running_statistics_names_these_alone() -> None:
    card = card_of("raw", None)
    assert "raw weights" in card
    assert "running averages of training" in card
    assert "moving average" not in card
    assert "standing" not in card
    assert "samples of these weights" not in card


def test_the_card_of_averaged_weights_with_standing_statistics_names_these_alone() -> None:
    card = card_of("ema", 64)
    assert "exponential moving average of the generator's weights" in card
    assert "64 samples of these weights" in card
    assert "raw" not in card
    assert "running" not in card


def test_a_card_states_score_protocol_and_origin() -> None:
    card = card_of("ema", 64)
    assert "# some-name" in card
    assert "**fd_x = 12.35**" in card
    for row in ("| samples | 100 |", "| batch norm | standing 64 |", "| kimg | 2 |", "| git commit | unknown |"):
        assert row in card


@pytest.mark.parametrize(
    ("num_classes", "said", "example"),
    [
        (12, f"images of 12 classes ({', '.join(f'`{name}`' for name in NAMES[:10])}, …).", "classes=['name 0']"),
        (2, "images of 2 classes (`name 0`, `name 1`).", "classes=['name 0']"),
        (0, "32×32 images.", "classes=None"),
    ],
)
def test_a_card_names_at_most_ten_classes(num_classes: int, said: str, example: str) -> None:
    card = card_of("ema", 32, num_classes)
    assert said in card
    assert example in card


def test_no_class_name_becomes_part_of_the_page() -> None:
    hostile = [
        "<script>alert(1)</script>",
        "[click](https://evil.example)",
        "https://evil.example",
        "a\n\n# Heading",
        "`<b>`",
        "``` <img src=x>",
        "\x1b[31mred\u202e",
        "![](x)|",
    ]
    card = card_of("ema", 32, hostile=hostile)
    page = MarkdownIt("commonmark", {"html": True}).enable(["table"]).render(card)
    for tag in ("<script", "<a ", "<b>", '<img src="x', "<img src=x", "\x1b", "\u202e"):
        assert tag not in page
    assert page.count("<h1>") == 1
