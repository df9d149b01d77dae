"""The page in a real browser: it fits a phone, and its own policy stops none of it."""

from pathlib import Path

import pytest
from PIL import Image

from capt_deploy.report import write_report
from tests.examples.browser import find_chromium, open_page

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
LONG = "a name that somebody made a whole sentence of, with averyveryverylongwordthatnothingbreaks"
# What sticks out of the page, but for what can be scrolled or is cut on purpose.
OUTSIDE = """[...document.querySelectorAll('body *')].filter(
    e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1).length"""


@pytest.fixture(scope="module")
def browser():
    if (chromium := find_chromium()) is None:
        pytest.skip("no Chromium is installed")
    with open_page(chromium) as page:
        yield page


@pytest.fixture
def report(make_data, tmp_path: Path) -> Path:
    for number in range(60):
        Image.new("RGB", (300, 200) if number % 2 else (32, 32)).save(tmp_path / f"{number}.png")
    files = [tmp_path / f"{number}.png" for number in range(60)]
    names = (LONG, "<script>document.title = 'caught'</script>", "c", "d")
    data = make_data(names=names, files=files, tuned=(True, True, False, False), strength=1.0)
    return write_report(data, "Some animals", tmp_path / "report")


@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_fits_and_shows_everything(browser, report, width):
    browser.events.clear()
    browser.resize(width, 800)
    browser.visit(report.as_uri())
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OUTSIDE) == 0
    pictures = "[...document.images].filter(e => e.complete && e.naturalWidth > 0).length"
    assert browser.evaluate(pictures) == browser.evaluate("document.images.length") > 10
    assert browser.evaluate("document.title") == "Some animals"
    # The style has come through the policy: bars are drawn, and of different lengths.
    widths = "[...document.querySelectorAll('.bar rect')].map(e => e.getBoundingClientRect().width)"
    assert len(set(browser.evaluate(widths))) > 5
    assert browser.evaluate("getComputedStyle(document.querySelector('.bars')).display") == "grid"


def test_nothing_is_fetched_and_nothing_is_stopped(browser, report):
    browser.events.clear()
    browser.visit(report.as_uri())
    browser.evaluate("1")
    asked = [
        e["params"]["request"]["url"] for e in browser.events if "request" in e.get("params", {})
    ]
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert [e for e in browser.events if e.get("method") == "Log.entryAdded"] == []
