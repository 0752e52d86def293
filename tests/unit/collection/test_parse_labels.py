from __future__ import annotations

import pytest

from pipeline.collection.parse_labels import label_of


@pytest.mark.parametrize(
    ("extension", "data", "label"),
    [
        (".cls", b"12", 12),
        (".cls", b" cat \n", "cat"),
        (".json", b'{"label": 3}', 3),
        (".json", b'{"cls": "4"}', 4),
        (".json", b'{"label": "dog", "cls": 1}', "dog"),
        (".json", b'{"width": 8}', None),
        (".json", b"[1]", None),
        (".cls", b"-1", None),
        (".cls", b"2.0", 2),
        (".json", b'{"label": null}', None),
        (".json", b'{"label": true}', True),
        (".txt", b"3", None),
    ],
)
def test_a_label_is_a_number_a_word_or_nothing(extension: str, data: bytes, label: int | str | None) -> None:
    assert label_of(extension, data) == label


@pytest.mark.parametrize(
    ("extension", "data", "reason"),
    [
        (".json", b"{", "Expecting"),
        (".json", b"[" * 100_000, "nested too deeply"),
        (".json", b'{"label": [1]}', "not a list"),
        (".json", b'{"label": 1.5}', "1.5"),
        (".json", b'{"label": NaN}', "nan"),
        (".cls", b"-7", "-7 is negative"),
        (".cls", b"100000000", "too large"),
        (".cls", b"9" * 5000, "too large"),
        (".cls", b"\xff", "decode"),
    ],
)
def test_what_is_no_label_is_refused(extension: str, data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        label_of(extension, data)
