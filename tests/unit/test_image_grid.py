from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.image_grid import beside_real, grid


def flat(colours: list[int], size: int = 32) -> torch.Tensor:
    """Images of one grey each."""
    return torch.stack([torch.full((3, size, size), c, dtype=torch.uint8) for c in colours])


def colours_in(page: object) -> set[tuple[int, ...]]:
    pixels = np.asarray(page).reshape(-1, 3)
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(int(c) for c in v) for v, n in zip(values, counts, strict=True) if n >= 32 * 32}


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("labels", [None, ["cat"] * 3 + ["dog"] * 2, ["a", "b", "c", "d", "a very long name indeed"]])
def test_every_image_is_on_the_page(size: int, labels: list[str] | None) -> None:
    greys = [10, 60, 120, 180, 240]
    page = grid(flat(greys, size), labels, columns=3, title="12 kimg")
    assert {(g, g, g) for g in greys} <= colours_in(page)


def test_small_images_are_magnified_without_smoothing() -> None:
    checker = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    checker[..., ::2] = 255
    page = np.asarray(grid(checker))
    assert set(np.unique(page)) == {0, 255}
    assert (page == 0).all(axis=2).sum() == 64 * 64 / 2


def test_rows_of_one_class_are_labelled_once_and_mixed_rows_image_by_image() -> None:
    images = flat([100] * 6)
    by_row = grid(images, ["zero"] * 3 + ["one"] * 3, columns=3)
    mixed = grid(images, ["zero", "one"] * 3, columns=3)
    plain = grid(images, None, columns=3)
    assert by_row.width > plain.width
    assert by_row.height == plain.height
    assert mixed.width == plain.width
    assert mixed.height > plain.height


def test_letters_that_cannot_be_printed_are_escaped() -> None:
    plain = grid(flat([100] * 2), ["a\\nb", "x"], title="it\\udce9")
    odd = grid(flat([100] * 2), ["a\nb", "x"], title="it\udce9")
    np.testing.assert_array_equal(np.asarray(odd), np.asarray(plain))


def test_real_images_stand_beside_generated_ones() -> None:
    pixels = np.asarray(beside_real(flat([50, 50]), flat([200, 200]), ["a", "b"], title="1 kimg"))
    generated, real = (np.flatnonzero((pixels == grey).all(axis=2).sum(axis=0) >= 64) for grey in (50, 200))
    assert len(generated) == len(real) == 2 * 64
    assert generated.max() < real.min()
