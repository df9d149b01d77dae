"""The page is whole, self-contained and safe, whatever classes and files are called."""

import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest

from capt_deploy.report.contents import find_contents
from capt_deploy.report.data import checked
from capt_deploy.report.page import page

pytest.importorskip("matplotlib")
EVIL = "<script>alert(1)</script>"


class Reader(HTMLParser):
    """Knows all elements and the text of a page; fails where elements are not nested well."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def read(data):
    data = checked(data)
    return Reader(page(data, find_contents(data)))


@pytest.fixture
def evil(make_data):
    files = [Path(f'/photos/"><img src=x onerror=alert(1)>{index}.png') for index in range(60)]
    data = make_data(
        names=(EVIL, "a&amp;b", "'\"", "水族館"),
        tuned=(True, True, False, False),
        files=files,
        title=EVIL,
        provenance={EVIL: {EVIL: [EVIL]}},
        notes=[EVIL],
    )
    return replace(data, models=[data.models[0], replace(data.models[1], name=EVIL)])


def test_names_of_the_users_stay_text(evil):
    found = read(evil)
    assert not {"script", "iframe", "object", "link", "form"} & {name for name, _ in found.found}
    assert EVIL in found.text and "a&amp;b" in found.text and "水族館" in found.text
    for name, attributes in found.found:
        assert not [key for key in attributes if key.startswith("on") or key == "style"], name
    assert all(own["src"].startswith("data:image/") for own in found.all("img"))


def test_nothing_is_fetched_and_nothing_runs(make_data):
    found = read(make_data())
    marks = {attributes["id"] for _, attributes in found.found if "id" in attributes}
    links = [own["href"] for own in found.all("a")]
    assert links and {link.removeprefix("#") for link in links} == marks
    (policy,) = [own["content"] for own in found.all("meta") if "http-equiv" in own]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_the_policy_lets_the_own_style_in(make_data):
    data = checked(make_data())
    text = page(data, find_contents(data))
    (css,) = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    assert b64encode(sha256(css.encode()).digest()).decode() in text
    assert "url(" not in css and "@import" not in css


def test_pictures_have_texts_and_tables_captions(make_data):
    found = read(make_data(tuned=(True, True, False, False)))
    assert all(own["alt"] for own in found.all("img"))
    assert len(found.all("caption")) == len(found.all("table")) == 4
    titles = [name for name, _ in found.found if name in ("h1", "h2")]
    assert titles == ["h1", *["h2"] * 7]
    assert len([own for own in found.all("img") if "Reliability" in own["alt"]]) == 6
    assert len([own for own in found.all("img") if "Risk" in own["alt"]]) == 3
    assert len([own for own in found.all("img") if "Confusion" in own["alt"]]) == 1


def test_figures_of_the_headline_are_those_of_the_data(make_data):
    data = checked(make_data(tuned=(True, True, False, False)))
    contents = find_contents(data)
    text = Reader(page(data, contents)).text
    main = contents.main
    assert f"{100 * main.report['harmonic_mean']:.1f}" in text
    for scope in ("base", "new", "all"):
        low, high = main.intervals[scope]
        accuracy = main.report[scope]["accuracy"]
        assert f"{100 * accuracy:.1f}{100 * low:.1f}–{100 * high:.1f}" in text
        assert f"{main.report[scope]['nll']:.3f}" in text


def test_tuning_that_makes_it_worse_is_said(make_data):
    data = make_data(strength=-3)
    assert "tuned is worse than zero-shot on all classes" in read(data).text


def test_without_a_zero_shot_model_nothing_is_compared(make_data):
    text = read(make_data(zero_shot=False)).text
    assert "zero-shot" not in text.lower()
    assert "Wrong: " in text
