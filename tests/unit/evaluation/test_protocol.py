from __future__ import annotations

from dataclasses import fields

import pytest

from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.measure import Score
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.records import ScoreRecord

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
