from __future__ import annotations

import pytest
import torch

from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.evaluation.frechet_distance import Moments
from pipeline.report import sample_analysis
from sagan.config import ModelConfig, OptimConfig
from sagan.random import Purpose, draw_latents
from sagan.train_state import TrainState
from sagan.trained_model import Model


@pytest.fixture(scope="module")
def uneven() -> Model:
    """A model whose classes differ, which those of an untrained one do not."""
    config = ModelConfig(resolution=32, num_classes=4, z_dim=16, channels_g=8, channels_d=8)
    state = TrainState(config, OptimConfig(), seed=0)
    torch.manual_seed(1)
    for name, tensor in state.ema.items():
        if "norm" in name and tensor.dim() == 2:
            tensor.add_(torch.randn_like(tensor), alpha=0.5)
    return Model.from_state(state, standing_images=64)


def test_between_latents_lie_on_the_arc() -> None:
    a, b = draw_latents(0, Purpose.SAMPLE_Z, range(2), 64)
    between = sample_analysis.spherical(a, b, 5)
    torch.testing.assert_close(between[[0, -1]], torch.stack([a, b]))
    steps = torch.nn.functional.cosine_similarity(between[:-1], between[1:])
    torch.testing.assert_close(steps, steps[:1].expand(4), rtol=1e-4, atol=1e-4)
    lengths = between.norm(dim=1)
    torch.testing.assert_close(lengths, torch.linspace(float(a.norm()), float(b.norm()), 5))


def test_between_classes_begins_and_ends_with_them(uneven: Model) -> None:
    z = draw_latents(3, Purpose.SAMPLE_Z, range(1), 16)
    images = sample_analysis.blended(uneven, 1, 3, 5).generate(z.expand(5, -1), torch.arange(5))
    ends = uneven.generate(z.expand(2, -1), torch.tensor([1, 3]))
    assert (images[[0, -1]].int() - ends.int()).abs().max() <= 1
    assert (ends[0].int() - ends[1].int()).abs().float().mean() > 2
    assert [row.title for row in sample_analysis.between_classes(uneven, 9, 2, 0)] == ["0 → 1", "1 → 2", "2 → 3"]


def test_the_distance_of_means_is_free_of_what_chance_adds() -> None:
    generator = torch.Generator().manual_seed(0)
    real = Moments.of(torch.randn(4000, 32, generator=generator))
    few = torch.randn(40, 32, generator=generator)
    naive = float((Moments.of(few).mean - real.mean).norm())
    assert sample_analysis.mean_distance(Moments.of(few), real) < naive / 2
    shift = torch.full((32,), 0.5)
    found = sample_analysis.mean_distance(Moments.of(few + shift), real)
    assert found == pytest.approx(float(shift.norm()), rel=0.15)


def test_classes_are_ranked_worst_first_and_small_ones_left_out() -> None:
    asked = torch.arange(4).repeat_interleave(torch.tensor([20, 20, 20, 5]))
    features = torch.randn(65, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    logits = torch.nn.functional.one_hot(asked, 4).float()
    logits[:10] = torch.tensor([0.0, 1, 0, 0])  # half of class 0 looks like class 1
    real, real_labels = features.clone(), asked.clone()
    features[asked == 2] += 3.0  # class 2 is right but far
    figures = sample_analysis.by_class(features, logits, asked, real, real_labels)
    assert [(f.index, f.generated, f.accuracy) for f in figures] == [(0, 20, 0.5), (2, 20, 1.0), (1, 20, 1.0)]
    assert figures[1].distance == pytest.approx(6.0, rel=0.05)
    assert [f.frechet for f in figures] == pytest.approx([0.0, 36.0, 0.0], abs=1e-4)
    without = sample_analysis.by_class(features, None, asked, real, real_labels)
    assert without[0].index == 2
    assert all(f.accuracy is None for f in without)
    wide = sample_analysis.by_class(features.repeat(1, 4), logits, asked, real.repeat(1, 4), real_labels)
    assert [(f.generated, f.real, f.frechet) for f in wide] == 3 * [(20, 20, None)]  # 16 features want 32 images


def test_copies_of_training_images_are_the_nearest(
    model: Model, digits: Collection, data: DataSection, extractor: str
) -> None:
    section = EvaluateSection(extractor=extractor, trust_extractor=True, samples=100)
    beside = sample_analysis.compare_with_real(model, digits, data, section, samples=200, rows=3)
    assert beside.training_images == 200
    assert beside.heldout is not None
    assert beside.heldout < beside.generated  # an untrained model is further away than real images are
    firsts = [float(row.captions[1].split()[-1]) for row in beside.nearest]
    assert firsts == sorted(firsts)
    for row in beside.nearest:
        assert row.images.shape == (1 + sample_analysis.NEIGHBOURS, 3, 32, 32)
        distances = [float(caption.split()[-1]) for caption in row.captions[1:]]
        assert distances == sorted(distances)
    assert {figures.index for figures in beside.classes} <= set(range(10))
