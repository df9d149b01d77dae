"""The server's page in a real browser: drop a photo, see the bars."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.server_load import Server, running_server
from capt_deploy.serving.classifier import Classifier
from tests.examples.browser import Page, find_chromium, open_page

PHOTO = Path(__file__).parents[1] / "golden" / "photos" / "test" / "green_leaf" / "0.png"
NAMES = "[...document.querySelectorAll('.name span:first-child')].map(e => e.textContent)"
SHARES = "[...document.querySelectorAll('.name span:last-child')].map(e => e.textContent)"
WIDTHS = (
    "[...document.querySelectorAll('.fill')].map(e => "
    "e.getBoundingClientRect().width / e.parentElement.getBoundingClientRect().width)"
)
STATUS = "document.getElementById('status').textContent"
SHOWN = "!document.getElementById('answer').hidden"


@pytest.fixture(scope="module")
def server(server_extra: None, golden: Path) -> Iterator[Server]:
    if find_chromium() is None:
        pytest.skip("no Chromium is installed")
    with running_server(golden, "--max-bytes", 200_000) as running:
        yield running


@pytest.fixture(scope="module")
def browser(server: Server) -> Iterator[Page]:
    chromium = find_chromium()
    assert chromium
    with open_page(chromium) as page:
        yield page


@pytest.fixture
def page(browser: Page, server: Server) -> Page:
    browser.resize(900, 800)
    browser.events.clear()
    browser.visit(f"http://{server.host}:{server.port}/")
    return browser


def check(page: Page, classifier: Classifier, photo: Path) -> None:
    """Compare what the page shows with what the classifier says."""
    top = classifier(photo).top(5)
    page.wait_for(SHOWN)
    assert page.evaluate(NAMES) == [label for label, _ in top]
    assert page.evaluate(SHARES) == [f"{100 * share:.1f} %" for _, share in top]
    widths = page.evaluate(WIDTHS)
    assert widths == pytest.approx([share for _, share in top], abs=0.005)
    assert page.evaluate(STATUS) == f"{top[0][0]}, {100 * top[0][1]:.1f} % sure"
    page.wait_for("document.getElementById('photo').naturalWidth > 0")


def complaints(page: Page) -> list[dict[str, object]]:
    page.evaluate("1")  # what has happened has been reported before the answer to this
    kinds = ("Log.entryAdded", "Runtime.exceptionThrown")
    return [event for event in page.events if event.get("method") in kinds]


def test_a_dropped_photo_gets_its_bars(page: Page, server: Server, classifier: Classifier) -> None:
    page.drop(PHOTO, 450, 150)
    check(page, classifier, PHOTO)
    assert complaints(page) == []
    requested = [
        event["params"]["request"]["url"]
        for event in page.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    own = (f"http://{server.host}:{server.port}/", "blob:", "data:")
    assert requested
    assert all(url.startswith(own) for url in requested), requested


def test_a_photo_dropped_beside_the_field_does_not_replace_the_page(
    page: Page, classifier: Classifier
) -> None:
    page.drop(PHOTO, 5, 700)
    check(page, classifier, PHOTO)


def test_the_keyboard_alone_chooses_a_photo(page: Page, classifier: Classifier) -> None:
    page.call("Page.setInterceptFileChooserDialog", enabled=True)
    page.press("Tab", 9)
    assert page.evaluate("document.activeElement.id") == "file"
    page.press(" ", 32)
    chosen = page.wait_for_event("Page.fileChooserOpened")
    for _ in range(2):  # the same photo twice is no less of a choice
        page.call(
            "DOM.setFileInputFiles", files=[str(PHOTO)], backendNodeId=chosen["backendNodeId"]
        )
        check(page, classifier, PHOTO)
        page.evaluate("document.getElementById('answer').hidden = true")


def test_what_is_no_photo_gets_the_reason(page: Page, tmp_path: Path) -> None:
    text = tmp_path / "photo.png"
    text.write_text("no photo")
    page.drop(text, 450, 150)
    page.wait_for(f"{STATUS}.includes('not an image')")
    assert not page.evaluate(SHOWN)


def test_a_photo_that_is_too_large_gets_the_reason(page: Page, tmp_path: Path) -> None:
    noise = Image.effect_noise((2000, 2000), 90)
    noise.save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 3_000_000
    page.drop(tmp_path / "large.png", 450, 150)
    page.wait_for(f"{STATUS}.includes('at most 200000 bytes')")


def test_a_phone_shows_all_of_it(page: Page, classifier: Classifier) -> None:
    page.resize(320, 640)
    page.drop(PHOTO, 160, 150)
    check(page, classifier, PHOTO)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
