from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.data.index import Collection
from pipeline.errors import UsageError
from pipeline.evaluation.measure import score_model
from sagan.sampling import Model

SECTION = EvaluateSection(extractor="classifier", samples=200, standing_images=64)


def score(
    model: Model, digits: Collection, data: DataSection, section: EvaluateSection = SECTION, seed: int = 0
) -> dict[str, float]:
    return score_model(model, section, digits, data=data, seed=seed, samples=200, judge_seed=0).values


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_does_not_change_a_score(batch: int, model: Model, digits: Collection, data: DataSection) -> None:
    section = SECTION.model_copy(update={"batch": batch})
    assert score(model, digits, data, section) == pytest.approx(score(model, digits, data), rel=1e-4)


def test_samples_are_decided_by_their_seed_alone(model: Model, digits: Collection, data: DataSection) -> None:
    torch.manual_seed(77)
    assert score(model, digits, data) == score(model, digits, data)
    assert score(model, digits, data, seed=1) != score(model, digits, data)


def test_a_protocol_says_all_that_was_chosen(model: Model, digits: Collection, data: DataSection) -> None:
    protocol = score_model(model, SECTION, digits, data=data, seed=3, samples=50, judge_seed=0).protocol
    assert protocol.to_dict() == {
        "extractor": "classifier",
        "extractor_digest": protocol.extractor_digest,
        "resize": "none",
        "precision": "float32",
        "reference_digest": digits.digest,
        "split": "train",
        "samples": 50,
        "seed": 3,
        "weights": "ema",
        "batch_norm": "standing 64",
        "repeats": 1,
    }
    assert len(protocol.extractor_digest) == 64


def test_the_score_that_ranks_can_be_chosen(model: Model, digits: Collection, data: DataSection) -> None:
    section = SECTION.model_copy(update={"score": "recall", "precision_recall": True})
    chosen = score_model(model, section, digits, data=data, seed=0, samples=200, judge_seed=0)
    assert chosen.key == "recall"
    assert chosen.higher_is_better
    assert chosen.value == chosen.values["recall"]
    assert set(chosen.values) == {
        *("fd_classifier", "isc_classifier", "kid_classifier", "class_accuracy", "precision", "recall")
    }


def test_a_score_that_is_not_measured_is_refused(model: Model, digits: Collection, data: DataSection) -> None:
    with pytest.raises(UsageError, match="'fid'") as caught:
        score(model, digits, data, SECTION.model_copy(update={"score": "fid"}))
    assert "fd_classifier" in caught.value.remedy


def test_images_of_another_size_are_not_compared(model: Model, digits: Collection, data: DataSection) -> None:
    with pytest.raises(UsageError, match=r"makes 32 px images, .* holds 64 px"):
        score(model, replace(digits, resolution=64), data)


def test_a_broken_model_is_a_result_and_no_crash(model: Model, digits: Collection, data: DataSection) -> None:
    broken = copy.deepcopy(model)
    next(broken.generator.parameters()).view(-1)[0] = float("nan")
    result = score_model(broken, SECTION, digits, data=data, seed=0, samples=200, judge_seed=0)
    assert result.values == {}
    assert result.value is None


def test_accuracy_is_left_out_where_the_extractor_knows_other_classes(
    model: Model, digits: Collection, data: DataSection, tmp_path: object
) -> None:
    class Stranger(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = images.float().mean((1, 3))
            return x, x[:, :10]

    torch.jit.script(Stranger()).save(f"{tmp_path}/stranger.ts")
    values = score(model, digits, data, SECTION.model_copy(update={"extractor": f"{tmp_path}/stranger.ts"}))
    assert set(values) == {"fd_stranger", "isc_stranger"}


def test_what_needs_logits_is_left_out_where_there_are_none(
    model: Model, digits: Collection, data: DataSection, tmp_path: object
) -> None:
    class Mute(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = images.float().mean((1, 3))
            return x, x[:, :0]

    torch.jit.script(Mute()).save(f"{tmp_path}/mute.ts")
    section = SECTION.model_copy(update={"extractor": f"{tmp_path}/mute.ts", "precision_recall": True})
    assert set(score(model, digits, data, section)) == {"fd_mute", "kid_mute", "precision", "recall"}
    for missing in ("isc_mute", "class_accuracy"):
        with pytest.raises(UsageError, match="does not give"):
            score(model, digits, data, section.model_copy(update={"score": missing}))
