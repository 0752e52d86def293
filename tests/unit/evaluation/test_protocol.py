from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import DataSection, EvaluateJob, EvaluateSection, PackSection
from pipeline.data.index import Collection
from pipeline.data.pack import pack
from pipeline.evaluation import evaluate
from pipeline.evaluation.evaluator import open_evaluator
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.measure import Score
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.records import ScoreRecord
from sagan.sampling import Model

PROTOCOL = Protocol(
    *("inception", "ab" * 32, "tf1-bilinear-299", "cd" * 32, "train"),
    samples=50_000,
    seed=0,
    weights="ema",
    batch_norm="standing 4096",
)


@pytest.mark.parametrize("field", [field.name for field in fields(Protocol)])
def test_every_part_of_a_protocol_is_part_of_its_name(field: str) -> None:
    value = getattr(PROTOCOL, field)
    changed = PROTOCOL.to_dict() | {field: value + 1 if isinstance(value, int) else value + "x"}
    other = Protocol(**changed)
    assert other.key("fid") != PROTOCOL.key("fid")


def test_the_same_protocol_has_the_same_name_wherever_it_is_computed() -> None:
    assert PROTOCOL.key("fid") == "fid/2334715d"


@pytest.mark.parametrize(
    ("name", "digest", "resize", "names"),
    [
        ("inception", "6726825d", "tf1-bilinear-299", ["fid", "isc", "kid"]),
        ("inception", "6726825d", "clean-bicubic-299", ["fid_clean", "isc_clean", "kid_clean"]),
        ("inception", "1234abcd", "tf1-bilinear-299", [f"{m}_inception_1234abcd" for m in ("fid", "isc", "kid")]),
        (
            "inception",
            "1234abcd",
            "clean-bicubic-299",
            [f"{m}_inception_1234abcd_clean" for m in ("fid", "isc", "kid")],
        ),
        ("vgg16", "397923af", "tf1-bilinear-224", [f"{m}_vgg16" for m in ("fd", "isc", "kid")]),
        ("vgg16", "6726825d", "tf1-bilinear-224", [f"{m}_vgg16_6726825d" for m in ("fd", "isc", "kid")]),
        (
            "clip-vit-b-32",
            "40d36571",
            "tf1-bilinear-224",
            [f"{m}_clip-vit-b-32_40d36571" for m in ("fd", "isc", "kid")],
        ),
        (
            "dinov2-vit-s-14",
            "1234abcd",
            "tf1-bilinear-224",
            [f"{m}_dinov2-vit-s-14_1234abcd" for m in ("fd", "isc", "kid")],
        ),
        ("classifier", "6726825d", "none", ["fd_classifier", "isc_classifier", "kid_classifier"]),
        ("resnet56-cifar10", "eca1", "none", [f"{m}_resnet56-cifar10" for m in ("fd", "isc", "kid")]),
    ],
)
def test_plain_names_are_for_published_inception_alone(name: str, digest: str, resize: str, names: list[str]) -> None:
    extractor = Extractor(name, digest.ljust(64, "0"), lambda images: (images, images), resize)
    assert [extractor.metric("fd"), extractor.metric("isc"), extractor.metric("kid")] == names


def test_a_record_from_before_precision_was_recorded_is_of_float32() -> None:
    record = ScoreRecord("c", 1000, Score(PROTOCOL, {"fid": 1.0}, "fid"), 2.0, 3)
    value = record.to_dict()
    assert value["protocol"].pop("precision") == "float32"
    assert ScoreRecord.from_dict(value) == record


class Scaled(torch.nn.Module):
    """A 2×2 thumbnail times a number as features, its first ten numbers as logits."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1) * self.scale
        return small, small[:, :10]


@pytest.fixture
def scaled(tmp_path: Path) -> EvaluateSection:
    return EvaluateSection(extractor=save_extractor(tmp_path / "one", 1.0), samples=64)


def save_extractor(folder: Path, scale: float) -> str:
    """A file of the same name, whatever it holds."""
    folder.mkdir()
    torch.jit.script(Scaled(scale)).save(str(folder / "scaled.ts"))
    return str(folder / "scaled.ts")


def test_a_changed_shard_or_extractor_file_changes_the_key(
    digits: Collection, model: Model, scaled: EvaluateSection, tmp_path: Path
) -> None:
    model.save(tmp_path / "model")

    def key(reference: str, section: EvaluateSection) -> str:
        job = EvaluateJob(name="x", model=str(tmp_path / "model"), reference=reference, evaluate=section)
        score = evaluate.run(job)["score"]
        assert score["key"] == "fd_scaled"
        return str(score["protocol"]["id"])

    same = pack(str(tmp_path / "same"), PackSection(source="digits", resolution=32)).url
    left_out = tmp_path / "bad.txt"
    left_out.write_text((Path(digits.url) / "keys.txt").read_text().splitlines()[0])
    fewer = pack(str(tmp_path / "fewer"), PackSection(source="digits", resolution=32, exclude=str(left_out))).url
    other = scaled.model_copy(update={"extractor": save_extractor(tmp_path / "other", 2.0)})
    before = key(digits.url, scaled)
    assert key(same, scaled) == before
    assert len({before, key(fewer, scaled), key(digits.url, other)}) == 3


def test_another_resize_changes_the_key_and_shares_no_statistics(
    digits: Collection, data: DataSection, model: Model, scaled: EvaluateSection
) -> None:
    kind = (model.weights, model.batch_norm)
    with open_evaluator(scaled, digits, data, 0) as evaluator:
        resized = replace(evaluator, extractor=replace(evaluator.extractor, resize="clean-299"))
        keys = {e.protocol(kind, seed=0, samples=64).key("fd_scaled") for e in (evaluator, resized)}
        assert len(keys) == 2
        stored = Path(digits.url) / "evaluation"
        counts = []
        for e in (evaluator, resized, resized):
            e.reference("train")
            counts.append(len(list(stored.glob("statistics-scaled-*"))))
        assert counts[1:] == [counts[0] + 1] * 2
