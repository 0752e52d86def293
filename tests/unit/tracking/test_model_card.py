from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

import pytest
from markdown_it import MarkdownIt

from pipeline.errors import printable
from pipeline.runs.score_protocol import Score
from pipeline.tracking.model_card import model_card
from sagan.config import ModelConfig, OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model
from tests.unit.score_protocol import PROTOCOL

NAMES = [f"name {i}" for i in range(12)]
TRAINING = {"kimg": "2", "git_commit": "unknown"}


def card_of(weights: str, standing_images: int | None, num_classes: int = 12, hostile: Sequence[str] = ()) -> str:
    """The card of an untrained model, as one line without Markdown's line breaks."""
    return " ".join(lines_of(weights, standing_images, num_classes, hostile).split())


def lines_of(
    weights: str,
    standing_images: int | None,
    num_classes: int = 12,
    hostile: Sequence[str] = (),
    training: Mapping[str, str] = TRAINING,
) -> str:
    config = ModelConfig(resolution=32, num_classes=num_classes, z_dim=16, channels_g=8, channels_d=8)
    names = [*hostile, *NAMES][:num_classes]
    state = TrainState(config, OptimConfig(), seed=0)
    model = Model.from_state(state, weights=weights, standing_images=standing_images, class_names=names)
    protocol = PROTOCOL.model_copy(update={"weights": model.weights, "batch_norm": model.batch_norm})
    score = Score.of(protocol, "fd_x", False, {"fd_x": 12.345678})
    return model_card("some-name", model, score, dict(training))


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


HOSTILE = [
    "<script>alert(1)</script>",
    "[click](https://evil.example)",
    "https://evil.example",
    "WWW.evil.example",
    "a\n\n# Heading",
    "`<b>`",
    "``` <img src=x>",
    "\x1b[31mred\u202e",
    "![](x)|",
    "__b__",
    "a\\|b\\",
]


def page_of(card: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable(["table"]).render(card)


def test_no_class_name_becomes_part_of_the_page() -> None:
    page = page_of(card_of("ema", 32, hostile=HOSTILE))
    for tag in ("<script", "<a ", "<b>", '<img src="x', "<img src=x", "\x1b", "\u202e"):
        assert tag not in page
    assert page.count("<h1>") == 1


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_run_took_from_a_foreign_model_is_shown_as_it_is(name: str) -> None:
    """The names of the classes of that model are part of it."""
    taken = f"the embedding of {name}; {'x' * 100}"
    page = page_of(lines_of("ema", 32, training={"init_taken": taken, "kimg": "2"}))
    (shown,) = re.findall(r"<td>init taken</td>\n<td><code>([^<]*)</code></td>\n</tr>\n<tr>\n<td>kimg", page)
    assert html.unescape(shown) == printable(taken.replace("\n", " "))


def test_what_needs_no_escape_is_shown_as_plain_text() -> None:
    for fact in ("models:/theirs/3", "G_ema.pth", "networks; moving average", "1e-05", "été", ""):
        assert f"| init taken | {fact} |" in lines_of("ema", 32, training={"init_taken": fact})
