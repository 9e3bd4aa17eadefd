"""A browser shows a page without a complaint, without asking for anything else, by day and by night, on any screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from recorded import FIGURES, make_run

from mpitrain.observe.console import Console
from mpitrain.report.command import report
from mpitrain.runtime.agree import MPI

pytestmark = pytest.mark.browser

BOXES = """
Array.from(document.querySelectorAll('figure'), figure => {
  const box = figure.querySelector('svg').getBoundingClientRect(), own = figure.getBoundingClientRect();
  return [figure.id, box.width, box.height, own.left, own.right];
})
"""
# Contrast as WCAG 2 has it, of every text in figures, captions and cells with what is behind it.
CONTRAST = """
(() => {
  const numbers = color => color.match(/[0-9.]+/g).map(Number);
  const linear = part => part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const card = getComputedStyle(document.querySelector('figure')).backgroundColor;
  const contrast = color => {
    const [a, b] = [light(numbers(color)), light(numbers(card))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const drawn = Array.from(document.querySelectorAll('svg text'), text => getComputedStyle(text).fill);
  const written = Array.from(document.querySelectorAll('figcaption, td, dd, dt'), text => getComputedStyle(text).color);
  return [light(numbers(card)), Math.min(...[...drawn, ...written].map(contrast)), drawn.length];
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser") / "home") as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    hostile = "<img src=x onerror=document.title=1>"
    runs = [
        make_run(place / hostile, labels=("<script>document.title=1</script>", "PER")),
        make_run(place / ("b" * 60)),
    ]
    for name, chosen in (("one", runs[1:]), ("several", runs)):
        report(MPI.COMM_SELF, chosen, place / name, Console(loud=False))
    return {name: place / name / "report.html" for name in ("one", "several")}


@pytest.mark.parametrize("name", ["one", "several"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_is_shown_without_complaint_and_asks_for_nothing_else(browser, pages, name, dark, width):
    browser.open(pages[name], width=width, dark=dark)
    assert browser.complaints == []
    assert [each for each in browser.requests if not each.startswith("data:")] == [pages[name].resolve().as_uri()]
    assert browser.ask("document.title") != "1", "a name was run"
    found = browser.ask(BOXES)
    assert {box[0] for box in found} == FIGURES
    assert all(across > 240 and down > 100 for _, across, down, *_ in found), "figures have a size"
    assert all(left >= 0 and right <= width for *_, left, right in found), "figures fit the screen"
    assert browser.ask("document.documentElement.scrollWidth") <= width, "nothing but tables scrolls sideways"
    columns = {round(left) for *_, left, _ in found}
    assert len(columns) == (1 if width == 360 else 2)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_can_be_read_by_day_and_by_night(browser, pages, dark):
    browser.open(pages["one"], dark=dark)
    card, least, texts = browser.ask(CONTRAST)
    assert (card < 0.05) if dark else (card > 0.9)
    assert least >= 4.5 and texts > 50


def test_a_complaint_and_a_request_would_be_seen(browser, tmp_path):
    (tmp_path / "bad.html").write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('no')</script>")
    browser.open(tmp_path / "bad.html")
    assert browser.complaints
    assert any(each.startswith("http://127.0.0.1:9/") for each in browser.requests)
