"""The report as its readers use it: in a browser, from a file, by pointing and by keyboard, on a phone's screen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.report import html_elements as html
from pipeline.report.attention_maps import Layer
from pipeline.report.attention_section import explorer
from pipeline.report.runs_and_models import Reader
from pipeline.report.write_report import write_report
from tests.system.browser import Browser
from tests.unit.report.conftest import checkpoint, data, digits, extractor, job, run, run_id, tracking

__all__ = ["checkpoint", "data", "digits", "extractor", "job", "run", "run_id", "tracking"]
pytestmark = [pytest.mark.system, pytest.mark.slow]

DESKTOP, PHONE = (1280, 900), (390, 844)

# Of every layer's panel: its cells by how much colour they have, the strongest first: [row, column, share of full].
OVERLAYS = """[...document.querySelectorAll("canvas")].map((canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const cells = Array.from({ length: data.length / 4 }, (_, i) =>
    [Math.floor(i / canvas.width), i % canvas.width, data[4 * i + 3] / 217]);
  return cells.sort((a, b) => b[2] - a[2]).slice(0, 2);
})"""
PANELS = """[...document.querySelectorAll(".map")].map((map) => {
  map.scrollIntoView({ block: "center" });
  const { left, top, width, height } = map.getBoundingClientRect();
  return { left, top, width, height };
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    """A page of two images and two layers.

    In the first layer the place (r, c) of 8×8 attends to the cell (c / 2, r / 2) of 4×4, in the second, of 16×16
    places, to the cell (r, c) of 16×16; for the second image everything is even.
    """
    turned, straight = torch.zeros(2, 8, 8, 4, 4), torch.zeros(2, 16, 16, 16, 16)
    for r in range(8):
        for c in range(8):
            turned[0, r, c, c // 2, r // 2] = 1
    for r in range(16):
        for c in range(16):
            straight[0, r, c, r, c] = 1
    turned[1], straight[1] = 1 / 16, 1 / 256
    layers = [Layer("generator", 0.5, turned), Layer("discriminator", -0.25, straight)]
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    path = tmp_path / "by hand.html"
    path.write_text(
        html.whole("by hand", [html.Section("Attention", explorer(layers, images, ["cat", "dog"], 1 << 20))])
    )
    return path


def click(browser: Browser, panel: int, down: float, across: float) -> None:
    """At a place of a panel, in shares of it."""
    browser.evaluate(f'document.querySelectorAll(".map")[{panel}].scrollIntoView({{ block: "center" }})')
    box = browser.evaluate(PANELS.replace('map.scrollIntoView({ block: "center" });', ""))[panel]
    browser.click(box["left"] + across * box["width"], box["top"] + down * box["height"])


def lit(browser: Browser) -> list[list[float]]:
    """The one cell of each layer's panel that has colour: row and column; all others have none."""
    cells = browser.evaluate(OVERLAYS)
    assert all(first[2] == pytest.approx(1, abs=0.01) and second[2] < 0.02 for first, second in cells), cells
    return [first[:2] for first, _ in cells]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_point_shows_where_every_layer_attends_from_there(
    browser: Browser, by_hand: Path, size: tuple[int, int]
) -> None:
    browser.open(by_hand, *size)
    assert lit(browser) == [[2, 2], [8, 8]]
    for panel in range(3):  # the image itself, and each layer's
        click(browser, panel, down=0.55, across=0.55)
        assert lit(browser) == [[2, 2], [8, 8]]
        click(browser, panel, down=0.20, across=0.90)  # row 1 and column 7 of 8, row 3 and column 14 of 16
        assert lit(browser) == [[3, 0], [3, 14]]
    said = browser.evaluate('document.querySelector(".readout").textContent')
    assert "From row 4, column 15 of 16" in said
    assert "generator, 8×8, attends most to row 4, column 1 of 4, with 16 times the uniform share" in said
    assert "discriminator, 16×16, attends most to row 4, column 15 of 16" in said


def test_everything_is_reached_by_keyboard(browser: Browser, by_hand: Path) -> None:
    browser.open(by_hand, *DESKTOP)
    focused = 'document.activeElement.getAttribute("aria-label") || document.activeElement.textContent'
    reached = []
    for _ in range(6):
        browser.press("Tab")
        reached.append(browser.evaluate(focused))
    panels = [f"{title}: arrow keys move the point" for title in ("image", "generator, 8×8, γ = 0.500")]
    assert reached[:5] == ["Attention", "cat", "dog", *panels]
    assert reached[5].startswith("discriminator")
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"

    for key, there in (("ArrowUp", [7, 8]), ("ArrowLeft", [7, 7]), ("ArrowDown", [8, 7]), ("ArrowRight", [8, 8])):
        browser.press(key)
        assert lit(browser)[1] == there
    for _ in range(20):
        browser.press("ArrowRight")
    assert lit(browser) == [[3, 2], [8, 15]]  # and no further than the edge

    browser.evaluate('document.querySelectorAll(".choices button")[1].focus()')
    browser.press("Enter")
    pressed = '[...document.querySelectorAll(".choices button")].map((b) => b.getAttribute("aria-pressed"))'
    assert browser.evaluate(pressed) == ["false", "true"]
    even = [first[2] for first, _ in browser.evaluate(OVERLAYS)]
    assert even == pytest.approx([1 / 8, 1 / 8], abs=0.01)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_run_s_page_needs_no_network_and_fits_the_screen(
    browser: Browser, run: Any, extractor: str, tmp_path: Path, size: tuple[int, int]
) -> None:
    out = tmp_path / "report.html"
    reader = Reader({}, {"extractor": extractor, "trust_extractor": True})
    write_report([run("first"), run("second")], out, 120, reader)
    browser.open(out, *size)
    assert browser.evaluate("document.documentElement.scrollWidth") == size[0]
    assert [url for url in browser.requested if not url.startswith("data:")] == [out.as_uri()]
    assert browser.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")

    before = browser.evaluate(OVERLAYS)
    click(browser, 0, down=0.1, across=0.1)
    assert browser.evaluate(OVERLAYS) != before

    shown = '[...document.querySelectorAll(".flipbook")[0].querySelectorAll("img")].map((image) => image.hidden)'
    assert browser.evaluate(shown) == [True, False]
    browser.evaluate('document.querySelector(".flipbook input").focus()')
    browser.press("ArrowLeft")
    assert browser.evaluate(shown) == [False, True]
    said = browser.evaluate('document.querySelector(".flipbook output").textContent')
    assert said.startswith("1 kimg, fd_pixels ")
    browser.screenshot(tmp_path / "shot.png")
    assert browser.failures == []
    assert json.loads(browser.evaluate('document.querySelector(".explorer script").textContent'))["layers"]
