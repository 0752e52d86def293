from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.collection.derived_tensors import derived
from pipeline.collection.manifest import Collection
from pipeline.errors import CorruptError
from pipeline.storage import file_sets


@pytest.fixture
def collection(copied: Path) -> Collection:
    return Collection.open(str(copied))


def make(value: float) -> Any:
    return lambda: ({"x": torch.full((2,), value)}, {"value": value})


def unexpected() -> Any:
    raise AssertionError("must not be made again")


def test_stored_tensors_are_used_again(collection: Collection) -> None:
    first = derived(collection, "stands", make(1.0))
    again = derived(collection, "stands", unexpected)
    assert again[1:] == first[1:]
    assert torch.equal(again[0]["x"], torch.ones(2))


def test_two_concurrent_makers_both_use_the_first_result(collection: Collection) -> None:
    def slower() -> Any:
        derived(collection, "race", make(1.0))  # somebody else finishes while this one computes
        return make(2.0)()

    tensors, facts, digest = derived(collection, "race", slower)
    assert facts == {"value": 1.0}
    assert torch.equal(tensors["x"], torch.ones(2))
    assert derived(collection, "race", unexpected)[2] == digest


def test_another_collection_at_the_same_place_has_its_own(collection: Collection) -> None:
    derived(collection, "digest", make(1.0))
    assert derived(replace(collection, digest="0123456789"), "digest", make(2.0))[1] == {"value": 2.0}


def test_a_damaged_file_is_found(collection: Collection) -> None:
    derived(collection, "damaged", make(1.0))
    (path,) = Path(collection.url).glob("evaluation/damaged-*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match="damaged"):
        derived(collection, "damaged", unexpected)


def test_a_read_only_collection_is_used_without_storing(collection: Collection) -> None:
    tensors, facts, _ = derived(replace(collection, url="/sys"), "x", make(3.0))
    assert facts == {"value": 3.0}
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
        derived(collection, "foreign", unexpected)
