from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.index import Collection
from pipeline.errors import CorruptError
from pipeline.evaluation.derived import derived


def make(value: float) -> Any:
    return lambda: ({"x": torch.full((2,), value)}, {"value": value})


def unexpected() -> Any:
    raise AssertionError("must not be made again")


def test_what_stands_is_used(digits: Collection) -> None:
    first = derived(digits, "stands", make(1.0))
    again = derived(digits, "stands", unexpected)
    assert again[1:] == first[1:]
    assert torch.equal(again[0]["x"], torch.ones(2))


def test_of_two_that_make_it_at_a_time_both_use_the_first(digits: Collection) -> None:
    def slower() -> Any:
        derived(digits, "race", make(1.0))  # somebody else finishes while this one computes
        return make(2.0)()

    tensors, facts, digest = derived(digits, "race", slower)
    assert facts == {"value": 1.0}
    assert torch.equal(tensors["x"], torch.ones(2))
    assert derived(digits, "race", unexpected)[2] == digest


def test_another_collection_at_the_same_place_has_its_own(digits: Collection) -> None:
    derived(digits, "digest", make(1.0))
    assert derived(replace(digits, digest="0123456789"), "digest", make(2.0))[1] == {"value": 2.0}


def test_a_damaged_file_is_found(digits: Collection) -> None:
    derived(digits, "damaged", make(1.0))
    (path,) = Path(digits.url).glob("evaluation/damaged-*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match="damaged"):
        derived(digits, "damaged", unexpected)


def test_a_collection_that_cannot_be_written_to_is_read_all_the_same(digits: Collection) -> None:
    tensors, facts, _ = derived(replace(digits, url="/sys"), "x", make(3.0))
    assert facts == {"value": 3.0}
    assert torch.equal(tensors["x"], torch.full((2,), 3.0))
