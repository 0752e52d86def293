from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file

from pipeline.collection.derived_tensors import Tensors, derived
from pipeline.collection.manifest import Collection
from pipeline.errors import CorruptError
from pipeline.storage import file_sets


@pytest.fixture
def collection(copied: Path) -> Collection:
    return Collection.open(str(copied))


class Facts(BaseModel):
    value: float


def use(collection: Collection, name: str, make: Any) -> tuple[Tensors, Facts, str]:
    return derived(collection, name, make, {"x": torch.empty(2, device="meta")}, Facts)


def make(value: float) -> Any:
    return lambda: ({"x": torch.full((2,), value)}, {"value": value})


def unexpected() -> Any:
    raise AssertionError("must not be made again")


def test_stored_tensors_are_used_again(collection: Collection) -> None:
    first = use(collection, "stands", make(1.0))
    again = use(collection, "stands", unexpected)
    assert again[1:] == first[1:]
    assert torch.equal(again[0]["x"], torch.ones(2))


def test_two_concurrent_makers_both_use_the_first_result(collection: Collection) -> None:
    def slower() -> Any:
        use(collection, "race", make(1.0))  # somebody else finishes while this one computes
        return make(2.0)()

    tensors, facts, digest = use(collection, "race", slower)
    assert facts.value == 1.0
    assert torch.equal(tensors["x"], torch.ones(2))
    assert use(collection, "race", unexpected)[2] == digest


def test_another_collection_at_the_same_place_has_its_own(collection: Collection) -> None:
    use(collection, "digest", make(1.0))
    assert use(replace(collection, digest="0123456789"), "digest", make(2.0))[1].value == 2.0


def test_a_damaged_file_is_found(collection: Collection) -> None:
    use(collection, "damaged", make(1.0))
    (path,) = Path(collection.url).glob("evaluation/damaged-*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match="damaged"):
        use(collection, "damaged", unexpected)


def test_a_read_only_collection_is_used_without_storing(collection: Collection) -> None:
    tensors, facts, _ = use(replace(collection, url="/sys"), "x", make(3.0))
    assert facts.value == 3.0
    assert torch.equal(tensors["x"], torch.full((2,), 3.0))


@pytest.mark.parametrize("contents", [{}, {"a": b"x", "b": b"x"}, {"a": b"x"}])
def test_a_stored_set_that_is_not_one_file_of_tensors_is_refused(
    collection: Collection, tmp_path: Path, contents: dict[str, bytes]
) -> None:
    (tmp_path / "made").mkdir()
    for name, data in contents.items():
        (tmp_path / "made" / name).write_bytes(data)
    file_sets.upload_set(tmp_path / "made", f"{collection.url}/evaluation/foreign-{collection.digest[:8]}")
    with pytest.raises(CorruptError, match="tensors"):
        use(collection, "foreign", unexpected)


@pytest.mark.parametrize(
    ("tensors", "facts", "named"),
    [
        ({"y": torch.ones(2)}, {"value": 1.0}, "x is absent"),
        ({"x": torch.ones(2), "y": torch.ones(2)}, {"value": 1.0}, "y is torch.float32"),
        ({"x": torch.ones(3)}, {"value": 1.0}, r"x is torch.float32 \[3\]; it must be torch.float32 \[2\]"),
        ({"x": torch.ones(2, dtype=torch.int64)}, {"value": 1.0}, "x is torch.int64"),
        ({"x": torch.ones(2)}, {"value": "much"}, "value: Input should be a valid number"),
        ({"x": torch.ones(2)}, {}, "value: Field required"),
        ({"x": torch.ones(2**19)}, {"value": 1.0}, "bytes, but at most"),
    ],
)
def test_a_stored_set_with_other_tensors_or_facts_is_refused(
    collection: Collection, tmp_path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any], named: str
) -> None:
    (tmp_path / "made").mkdir()
    save_file(tensors, tmp_path / "made" / "a.safetensors")
    url = f"{collection.url}/evaluation/foreign-{collection.digest[:8]}"
    file_sets.upload_set(tmp_path / "made", url, **facts)
    with pytest.raises(CorruptError, match=named):
        use(collection, "foreign", unexpected)
