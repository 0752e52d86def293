from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.evaluation.sample_grid import sample_grid
from pipeline.evaluation.scorer import open_scorer
from sagan.config import OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model

TILE = 64 + 4


@pytest.mark.parametrize(("count", "tiles"), [(20, (2, 10)), (64, (6, 10)), (4, (4, 1))])
def test_few_classes_get_a_row_each_and_many_an_image_each(
    count: int, tiles: tuple[int, int], model: Model, digits: Collection, data: DataSection
) -> None:
    page = sample_grid(model, EvaluateSection(grid=count), digits, data, "")
    columns, rows = tiles
    assert 2 * columns * TILE < page.width < 2 * columns * TILE + 250
    assert rows * TILE < page.height < rows * TILE + 100


def test_the_same_latents_are_shown_every_time(model: Model, digits: Collection, data: DataSection) -> None:
    pages = [sample_grid(model, EvaluateSection(grid=20), digits, data, "").tobytes() for _ in range(2)]
    assert pages[0] == pages[1]


def test_without_classes_images_are_scored_and_shown_too(model: Model, digits: Collection, data: DataSection) -> None:
    networks = replace(model.config, num_classes=0)
    plain = Model.from_state(TrainState(networks, OptimConfig(), 0), standing_images=64)
    page = sample_grid(plain, EvaluateSection(grid=16), digits, data, "0 kimg")
    assert page.height > 2 * TILE
    section = EvaluateSection(extractor="classifier", samples=50)
    with open_scorer(section, digits, data, classifier_seed=0) as scorer:
        score = scorer.score(plain, scorer.protocol(plain, seed=0, samples=50))
    assert set(score.values) == {"fd_classifier", "isc_classifier"}
