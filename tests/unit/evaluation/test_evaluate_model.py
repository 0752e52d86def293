from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.collection.manifest import Collection
from pipeline.config.schema import EvaluateJob, EvaluateSection, PackSection
from pipeline.errors import CorruptError, UsageError
from pipeline.evaluation.evaluate_model import evaluate_model
from pipeline.packing.pack import pack
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.score_protocol import Score
from pipeline.storage.file_sets import Manifest
from pipeline.tracking.open_model import open_model
from sagan.trained_model import Model

Commit = Callable[..., StoredCheckpoint]


def score_of(model: str, reference: str, section: EvaluateSection) -> Score:
    return evaluate_model(EvaluateJob(name="x", model=model, reference=reference, evaluate=section)).score


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ({}, ("ema", "standing 64")),
        ({"weights": "raw"}, ("raw", "standing 64")),
        ({"standing_images": None}, ("ema", "running")),
    ],
)
def test_a_score_names_weights_and_statistics_and_so_does_the_model_that_it_is_of(
    overrides: dict[str, Any], kind: tuple[str, str], checkpoint: Commit, digits: Collection, tmp_path: Path
) -> None:
    section = EvaluateSection.model_validate(
        {"extractor": "classifier", "samples": 50, "standing_images": 64} | overrides
    )
    url = checkpoint(1000, change=lambda state: state.ema["conv.weight"].mul_(2)).url
    open_model(url, section=section).save(tmp_path / "folder")
    scores = [score_of(model, digits.url, section) for model in (url, str(tmp_path / "folder"))]
    for score in scores:
        assert (score.protocol.weights, score.protocol.batch_norm) == kind
    assert scores[0].values == pytest.approx(scores[1].values, rel=1e-6)


def test_a_folder_and_a_checkpoint_are_scored_alike(checkpoint: Commit, digits: Collection, tmp_path: Path) -> None:
    url = checkpoint(1000).url
    section = EvaluateSection(extractor="classifier", samples=100, standing_images=64)
    open_model(url, section=section).save(tmp_path / "folder")
    scores = [score_of(model, digits.url, section) for model in (url, str(tmp_path / "folder"))]
    assert scores[0].values == pytest.approx(scores[1].values, rel=1e-6)
    with pytest.raises(UsageError, match="no model"):
        score_of(str(tmp_path / "nothing"), digits.url, section)


def test_images_of_another_size_are_not_compared(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    larger = pack(str(tmp_path / "larger"), PackSection(source="digits", resolution=64)).url
    with pytest.raises(UsageError, match=r"images of 32 px, .* holds images of 64 px"):
        score_of(str(tmp_path / "model"), larger, EvaluateSection(extractor="classifier", samples=50))


class Scaled(torch.nn.Module):
    """A 2×2 thumbnail times a number as features, its first ten numbers as logits."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1) * self.scale
        return small, small[:, :10]


def save_extractor(folder: Path, scale: float) -> str:
    """A file of the same name, whatever it holds."""
    folder.mkdir()
    torch.jit.script(Scaled(scale)).save(str(folder / "scaled.ts"))
    return str(folder / "scaled.ts")


def test_a_changed_shard_or_extractor_file_changes_the_key(digits: Collection, model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "model")

    def key(reference: str, extractor: str) -> str:
        section = EvaluateSection(extractor=extractor, trust_extractor=True, samples=64)
        score = score_of(str(tmp_path / "model"), reference, section)
        assert score.metric == "fd_scaled"
        return score.key

    same = pack(str(tmp_path / "same"), PackSection(source="digits", resolution=32)).url
    left_out = tmp_path / "bad.txt"
    left_out.write_text((Path(digits.url) / "keys.txt").read_text().splitlines()[0])
    fewer = pack(str(tmp_path / "fewer"), PackSection(source="digits", resolution=32, exclude=str(left_out))).url
    one, two = save_extractor(tmp_path / "one", 1.0), save_extractor(tmp_path / "two", 2.0)
    before = key(digits.url, one)
    assert key(same, one) == before
    assert len({before, key(fewer, one), key(digits.url, two)}) == 3


def test_a_model_or_a_checkpoint_of_an_older_version_is_refused_by_its_format(
    checkpoint: Commit, model: Model, tmp_path: Path
) -> None:
    model.save(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"format": 4', '"format": 3'))
    with pytest.raises(UsageError, match=r"config\.json: it has format 3; this version reads format 4"):
        open_model(str(tmp_path / "model"))
    folder = Path(checkpoint(1000).url)
    facts = folder / "state.json"
    facts.write_text(facts.read_text().replace('"format": 3', '"format": 2'))
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_bytes(Manifest.of(folder).to_bytes())
    with pytest.raises(CorruptError, match=r"state\.json: it has format 2; this version reads format 3"):
        open_model(str(folder))


@pytest.mark.parametrize("names", [["ant"], ["ant"] * 10])
def test_class_names_of_a_checkpoint_that_do_not_fit_its_model_are_refused(
    checkpoint: Commit, names: list[str]
) -> None:
    with pytest.raises(CorruptError, match=r"checkpoint\.json: class_names"):
        open_model(checkpoint(1000, class_names=names).url)


@pytest.mark.parametrize("missing", ["checkpoint.json", "state.safetensors", "manifest.json"])
def test_a_checkpoint_without_one_of_its_files_is_refused(checkpoint: Commit, missing: str) -> None:
    folder = Path(checkpoint(1000).url)
    (folder / missing).unlink()
    if missing != "manifest.json":
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").write_bytes(Manifest.of(folder).to_bytes())
    with pytest.raises(CorruptError, match=missing.replace(".", r"\.")):
        open_model(str(folder))
