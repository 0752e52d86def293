from __future__ import annotations

from dataclasses import fields

import pytest

from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.protocol import Protocol

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
    assert PROTOCOL.key("fid") == "fid/d5ba52dc"


@pytest.mark.parametrize(
    ("name", "digest", "names"),
    [
        ("inception", "6726825d" + 56 * "0", ["fid", "isc", "kid"]),
        ("inception", "1234abcd" + 56 * "0", [f"{m}_inception_1234abcd" for m in ("fid", "isc", "kid")]),
        ("classifier", "6726825d" + 56 * "0", ["fd_classifier", "isc_classifier", "kid_classifier"]),
        ("resnet56-cifar10", "eca1" + 60 * "0", [f"{m}_resnet56-cifar10" for m in ("fd", "isc", "kid")]),
    ],
)
def test_plain_names_are_for_published_inception_alone(name: str, digest: str, names: list[str]) -> None:
    extractor = Extractor(name, digest, lambda images: (images, images))
    assert [extractor.metric("fd"), extractor.metric("isc"), extractor.metric("kid")] == names
