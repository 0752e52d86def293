from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.errors import CorruptError, SaganError, UsageError
from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.evaluation.metrics import METRICS, Metric
from pipeline.evaluation.scorer import Scorer, open_scorer
from pipeline.runs.score_protocol import Score
from pipeline.storage import file_sets
from sagan.config import ModelConfig, OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model
from tests.unit.evaluation.conftest import NETWORKS

# --- scores ----------------------------------------------------------------------------------------------------------

SECTION = EvaluateSection(extractor="classifier", samples=200, standing_images=64)


def score_model(
    model: Model,
    digits: Collection,
    data: DataSection,
    section: EvaluateSection = SECTION,
    seed: int = 0,
    samples: int = 200,
    repeats: int = 1,
) -> Score:
    with open_scorer(section, digits, data, classifier_seed=0) as scorer:
        return scorer.score(model, scorer.protocol(model, seed=seed, samples=samples, repeats=repeats))


def values_of(
    model: Model, digits: Collection, data: DataSection, section: EvaluateSection = SECTION, seed: int = 0
) -> dict[str, float]:
    return score_model(model, digits, data, section, seed).values


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_does_not_change_a_score(batch: int, model: Model, digits: Collection, data: DataSection) -> None:
    section = SECTION.model_copy(update={"batch": batch})
    assert values_of(model, digits, data, section) == pytest.approx(values_of(model, digits, data), rel=1e-4)


def test_samples_are_decided_by_their_seed_alone(model: Model, digits: Collection, data: DataSection) -> None:
    torch.manual_seed(77)
    assert values_of(model, digits, data) == values_of(model, digits, data)
    assert values_of(model, digits, data, seed=1) != values_of(model, digits, data)


def test_a_protocol_names_every_choice(model: Model, digits: Collection, data: DataSection) -> None:
    protocol = score_model(model, digits, data, seed=3, samples=50).protocol
    assert protocol.to_dict() == {
        "extractor": "classifier",
        "extractor_digest": protocol.extractor_digest,
        "resize": "none",
        "extractor_dtype": "float32",
        "reference_digest": digits.digest,
        "split": "train",
        "samples": 50,
        "seed": 3,
        "weights": "ema",
        "batch_norm": "standing 64",
        "repeats": 1,
    }
    assert len(protocol.extractor_digest) == 64


def test_repeats_are_scores_of_ranges_of_samples_that_follow_each_other(
    model: Model, digits: Collection, data: DataSection
) -> None:
    both = score_model(model, digits, data, samples=60, repeats=2)
    first = score_model(model, digits, data, samples=60)
    assert set(both.deviations) == set(both.values) == set(first.values)
    assert both.value is not None
    assert both.deviation is not None
    assert first.value is not None
    assert first.deviation is None
    # Of two values a and b the mean is (a + b) / 2 and the standard deviation |a − b| / √2.
    assert abs(first.value - both.value) == pytest.approx(both.deviation / 2**0.5)


def names(metrics: list[Metric], extractor: str) -> set[str]:
    return {f"{metric.name}_{extractor}" if metric.by_extractor else metric.name for metric in metrics}


FEATURE_METRICS = [metric for metric in METRICS if metric.needs == "features"]


@pytest.mark.parametrize(("name", "higher"), [("recall", True), ("kid_classifier", False), ("coverage", True)])
def test_the_metric_that_ranks_is_chosen_and_has_the_direction_of_the_table(
    name: str, higher: bool, model: Model, digits: Collection, data: DataSection
) -> None:
    section = SECTION.model_copy(update={"score": name, "feature_metrics": True})
    score = score_model(model, digits, data, section)
    assert score.metric == name
    assert score.higher_is_better is higher
    assert score.value == score.values[name]
    assert set(score.values) == {
        "fd_classifier",
        "isc_classifier",
        "class_accuracy",
        *names(FEATURE_METRICS, "classifier"),
    }


def test_a_metric_that_is_not_computed_is_refused(model: Model, digits: Collection, data: DataSection) -> None:
    with pytest.raises(UsageError, match="'fid'") as caught:
        values_of(model, digits, data, SECTION.model_copy(update={"score": "fid"}))
    assert "fd_classifier" in caught.value.remedy
    with pytest.raises(UsageError, match="'precision'") as caught:
        values_of(model, digits, data, SECTION.model_copy(update={"score": "precision"}))
    assert "evaluate.feature_metrics: true" in caught.value.remedy


def test_a_broken_model_has_a_score_without_values(model: Model, digits: Collection, data: DataSection) -> None:
    broken = copy.deepcopy(model)
    next(broken.generator.parameters()).view(-1)[0] = float("nan")
    score = score_model(broken, digits, data)
    assert score.metric == "fd_classifier"
    assert score.values == {}
    assert score.value is None


def test_accuracy_is_left_out_where_the_extractor_knows_other_classes(
    model: Model, digits: Collection, data: DataSection, tmp_path: Path
) -> None:
    class Stranger(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = images.float().mean((1, 3))
            return x, x[:, :10]

    torch.jit.script(Stranger()).save(f"{tmp_path}/stranger.ts")
    section = SECTION.model_copy(update={"extractor": f"{tmp_path}/stranger.ts", "trust_extractor": True})
    assert set(values_of(model, digits, data, section)) == {"fd_stranger", "isc_stranger"}
    with pytest.raises(UsageError, match="stranger does not know the classes"):
        values_of(model, digits, data, section.model_copy(update={"score": "class_accuracy"}))


@pytest.mark.parametrize(
    ("config", "names"),
    [(dataclasses.replace(NETWORKS, num_classes=7), []), (NETWORKS, [*"1032456789"])],
    ids=["other number", "other order"],
)
def test_accuracy_is_left_out_where_the_model_generates_other_classes(
    config: ModelConfig, names: list[str], digits: Collection, data: DataSection
) -> None:
    stranger = Model.from_state(TrainState(config, OptimConfig(), seed=0), standing_images=64)
    stranger.class_names = names
    assert "class_accuracy" not in values_of(stranger, digits, data)
    own = Model.from_state(TrainState(NETWORKS, OptimConfig(), seed=0), standing_images=64)
    own.class_names = list(digits.class_names)
    assert "class_accuracy" in values_of(own, digits, data)


def test_metrics_of_logits_are_left_out_where_there_are_none(
    model: Model, digits: Collection, data: DataSection, tmp_path: Path
) -> None:
    class Mute(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = images.float().mean((1, 3))
            return x, x[:, :0]

    torch.jit.script(Mute()).save(f"{tmp_path}/mute.ts")
    trusted = {"extractor": f"{tmp_path}/mute.ts", "trust_extractor": True}
    section = SECTION.model_copy(update={**trusted, "feature_metrics": True})
    expected = {"fd_mute", *names(FEATURE_METRICS, "mute")}
    assert set(values_of(model, digits, data, section)) == expected
    for missing in ("isc_mute", "class_accuracy"):
        with pytest.raises(UsageError, match="is not computed with extractor"):
            values_of(model, digits, data, section.model_copy(update={"score": missing}))


# --- real images -----------------------------------------------------------------------------------------------------


def scorer_of(digits: Collection, data: DataSection, extractor: Extractor, batch: int = 64) -> Scorer:
    return Scorer(EvaluateSection(batch=batch), digits, data, extractor, None)


def brightness(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two features that anybody can compute, and logits that always say class 1."""
    x = images.float().mean((1, 3))
    return x[:, ::8], torch.nn.functional.one_hot(torch.ones(len(x), dtype=torch.int64), 10).float()


def test_reference_moments_are_those_of_all_images_and_are_taken_once(digits: Collection, data: DataSection) -> None:
    calls = []

    def counted(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if images.any():  # a black image only shows the number of features
            calls.append(len(images))
        return brightness(images)

    extractor = Extractor("brightness", "aa" * 32, counted)
    first = scorer_of(digits, data, extractor, batch=50).reference("heldout")
    assert sum(calls) == digits.size("heldout") == first.moments.count
    again = scorer_of(digits, data, extractor, batch=7).reference("heldout")
    assert sum(calls) == digits.size("heldout")
    torch.testing.assert_close(again.moments.scatter, first.moments.scatter, rtol=0, atol=0)
    ones = float((digits.labels[list(digits.ids("heldout"))] == 1).mean())
    assert again.accuracy == first.accuracy == pytest.approx(ones)


def test_another_extractor_split_or_resize_has_its_own_statistics(digits: Collection, data: DataSection) -> None:
    def twice(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, logits = brightness(images)
        return 2 * x, logits

    a = scorer_of(digits, data, Extractor("b", "bb" * 32, brightness)).reference("heldout")
    other_file = scorer_of(digits, data, Extractor("b", "cc" * 32, twice)).reference("heldout")
    other_resize = scorer_of(digits, data, Extractor("b", "bb" * 32, twice, resize="clean")).reference("heldout")
    other_split = scorer_of(digits, data, Extractor("b", "bb" * 32, brightness)).reference("train")
    for other in (other_file, other_resize):
        torch.testing.assert_close(other.moments.mean, 2 * a.moments.mean)
    assert other_split.moments.count == digits.size("train")


def test_another_resize_changes_the_key_and_shares_no_statistics(
    digits: Collection, data: DataSection, model: Model
) -> None:
    scorer = scorer_of(digits, data, Extractor("shared", "ff" * 32, brightness))
    resized = dataclasses.replace(scorer, extractor=dataclasses.replace(scorer.extractor, resize="clean-299"))
    keys = {s.protocol(model, seed=0, samples=64).key("fd_shared") for s in (scorer, resized)}
    assert len(keys) == 2
    stored = Path(digits.url) / "evaluation"
    counts = []
    for s in (scorer, resized, resized):
        s.reference("train")
        counts.append(len(list(stored.glob("statistics-shared-*"))))
    assert counts == [1, 2, 2]


def test_reference_features_are_spread_over_the_split(digits: Collection, data: DataSection) -> None:
    of_brightness = scorer_of(digits, data, Extractor("b", "dd" * 32, brightness))
    everything = of_brightness.reference_features("heldout", 10_000)
    some = of_brightness.reference_features("heldout", 90)
    assert everything.shape == (360, 4)
    torch.testing.assert_close(some, everything[::4])


def test_rows_of_all_real_images_are_those_that_the_statistics_were_taken_of(
    digits: Collection, data: DataSection
) -> None:
    calls = []

    def counted(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if images.any():  # a black image only shows the number of features
            calls.append(len(images))
        return brightness(images)

    section = EvaluateSection(feature_metrics=True, samples=1000)
    of_brightness = Scorer(section, digits, data, Extractor("b", "ee" * 32, counted), None)
    moments = of_brightness.reference("heldout").moments
    rows = of_brightness.reference_features("heldout", 1000)
    assert sum(calls) == digits.size("heldout") == len(rows)
    torch.testing.assert_close(rows.double().mean(0), moments.mean)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"mean": torch.zeros(3, dtype=torch.float64)}, "mean is"),
        ({"scatter": torch.eye(4)}, "scatter is torch.float32"),
        ({"scatter": torch.full((4, 4), float("nan"), dtype=torch.float64)}, "not finite"),
        ({"scatter": torch.eye(4, dtype=torch.float64) * 1e300}, "not finite"),
        ({"accuracy": 7.0}, "accuracy: Input should be less than or equal to 1"),
        ({"accuracy": "all"}, "accuracy: "),
        ({"count": -5}, ""),
    ],
)
def test_statistics_that_somebody_else_stored_are_checked(
    digits: Collection, data: DataSection, tensors: dict[str, Any], named: str, tmp_path: Path
) -> None:
    collection = dataclasses.replace(digits, url=str(shutil.copytree(digits.url, tmp_path / "theirs")))
    right = scorer_of(collection, data, Extractor("theirs", "ab" * 32, brightness)).reference("heldout")
    (stored,) = Path(collection.url).glob("evaluation/statistics-theirs-*")
    facts = {"count": right.moments.count, "accuracy": right.accuracy} | tensors
    made = tmp_path / "made"
    made.mkdir()
    values = {"mean": right.moments.mean, "scatter": right.moments.scatter}
    save_file({name: tensors.get(name, value) for name, value in values.items()}, made / "a.safetensors")
    shutil.rmtree(stored)
    file_sets.upload_set(made, str(stored), count=facts["count"], accuracy=facts["accuracy"])
    again = scorer_of(collection, data, Extractor("theirs", "ab" * 32, brightness))
    if named:
        with pytest.raises(CorruptError, match=named):
            again.reference("heldout")
    else:  # the number of images is that of the collection
        assert again.reference("heldout").moments.count == digits.size("heldout")


def test_a_score_that_is_not_finite_is_an_error_that_names_the_extractor(
    model: Model, digits: Collection, data: DataSection
) -> None:
    def overflowing(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, logits = brightness(images)
        return x, logits * float("inf")

    scorer = scorer_of(digits, data, Extractor("overflowing", "ac" * 32, overflowing))
    with pytest.raises(SaganError, match="overflowing gives features or logits that are not finite"):
        scorer.score(model, scorer.protocol(model, seed=0, samples=64))
