"""The page is whole, self-contained and safe, whatever classes and files are called."""

import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest

from capt_deploy.report.page import escape_markdown, render_html, render_markdown
from capt_deploy.report.results import find_results
from capt_deploy.report.write import as_json

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
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


def read(data, title="Some animals"):
    return Reader(render_html(find_results(data, title)))


@pytest.fixture
def evil(make_data):
    files = [Path(f'/photos/"><img src=x onerror=alert(1)>{index}.png') for index in range(60)]
    data = make_data(
        names=(EVIL, "a&amp;b", "'\"", "水族館"),
        tuned=(True, True, False, False),
        files=files,
        provenance={EVIL: {EVIL: [EVIL]}},
        notes=[EVIL],
    )
    return replace(data, scores={EVIL: data.main})


def test_names_of_the_users_stay_text(evil):
    found = read(evil, EVIL)
    assert not {"script", "iframe", "object", "link", "form"} & {name for name, _ in found.found}
    assert EVIL in found.text and "a&amp;b" in found.text and "水族館" in found.text
    for name, attributes in found.found:
        assert not [key for key in attributes if key.startswith("on") or key == "style"], name
    assert all(image["src"].startswith("data:image/") for image in found.all("img"))


def test_nothing_is_fetched_and_nothing_runs(make_data):
    found = read(make_data())
    marks = {attributes["id"] for _, attributes in found.found if "id" in attributes}
    links = [link["href"] for link in found.all("a")]
    assert links and {link.removeprefix("#") for link in links} == marks
    (policy,) = [meta["content"] for meta in found.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_the_policy_lets_the_own_style_in(make_data):
    text = render_html(find_results(make_data(), ""))
    (css,) = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    assert b64encode(sha256(css.encode()).digest()).decode() in text
    assert "url(" not in css and "@import" not in css


def test_pictures_have_texts_and_tables_captions(make_data):
    found = read(make_data(tuned=(True, True, False, False)))
    assert all(image["alt"] for image in found.all("img"))
    assert len(found.all("caption")) == len(found.all("table")) == 5
    titles = [name for name, _ in found.found if name in ("h1", "h2")]
    assert titles == ["h1", *["h2"] * 6]
    texts = [image["alt"] for image in found.all("img")]
    for kind, count in (("Reliability", 6), ("Risk", 3)):
        assert len([text for text in texts if text.startswith(kind)]) == count


def test_the_learning_curve_is_a_section_of_both_reports(make_data):
    curve = {
        "photos": [4.0, 12.0],
        "accuracy": [0.5, 0.65],
        "twice": 24.0,
        "expected": 0.7,
        "low": 0.66,
        "high": 0.74,
        "gains": [{"class": EVIL, "gain": 0.03}],
    }
    choice = {
        "chosen": {"prompt": False, "side": None, "weight": 0.0},
        "table": [],
        "images": {"tuned": 12, "new": 0},
        "linear_probe": None,
        "learning_curve": curve,
    }
    data = replace(make_data(), provenance={"choice": choice})
    page = read(data)
    assert {"id": "more"} in page.all("h2") and f"{EVIL} (+3.0 points)" in page.text
    assert "70.0 expected (66.0–74.0)" in page.text
    assert "70.0 expected (66.0–74.0)" in render_markdown(find_results(data, ""))


def test_figures_of_the_headline_are_those_of_the_data(make_data):
    results = find_results(make_data(tuned=(True, True, False, False)), "")
    text = " ".join(Reader(render_html(results)).text.split())
    main = results.main
    assert f"{100 * main.report['harmonic_mean']:.1f}" in text
    for scope in ("base", "new", "all"):
        low, high = main.intervals[scope]
        accuracy = main.report[scope]["accuracy"]
        assert f"{100 * accuracy:.1f}{100 * low:.1f}–{100 * high:.1f}" in text
        assert f"{main.report[scope]['nll']:.3f}" in text


def test_tuning_that_makes_it_worse_is_said(make_data):
    data = make_data(strength=-3)
    assert "tuned is less accurate than zero-shot on all classes" in read(data).text


def test_without_a_zero_shot_model_nothing_is_compared(make_data):
    text = read(make_data(zero_shot=False)).text
    assert "zero-shot" not in text.lower()
    assert "Wrong: " in text


def test_the_first_lines_say_how_good_the_model_is(make_data):
    results = find_results(make_data(images=100, strength=4.0), "")
    right = round(100 * results.main.report["all"]["accuracy"])
    before = round(100 * results.zero_shot.report["all"]["accuracy"])
    worst = results.pairs[0]
    text = read(make_data(images=100, strength=4.0)).text
    assert f"Right on {right} of 100 photos ({right} %; zero-shot {before} %)." in text
    confidence = results.predictions.main.max(axis=1)
    sure = confidence >= 0.8
    hits = (results.predictions.main.argmax(axis=1) == results.predictions.labels)[sure]
    assert (
        f"Where it is at least 80 % sure ({sure.sum()} photos), it says "
        f"{100 * confidence[sure].mean():.0f} % on average and is right on "
        f"{100 * hits.mean():.0f} %."
    ) in text
    assert f"Most often confused: {worst.true} taken for {worst.predicted} (" in text


def test_few_sure_photos_and_no_confusions_are_not_made_much_of(make_data):
    text = read(make_data(images=1, strength=60.0)).text
    assert "Right on 1 of 1 photo (100 %" in text
    assert "Most often confused" not in text and "takes no photo for another class" in text
    assert not re.search(r"\b1 (photos|images)\b|\bof 0 |\(- %\)", text)


def matrix(found, names):
    """Return the cells of the confusion matrix by true and predicted class, (class, title)."""
    cells = {}
    for attributes in found.all("td"):
        if " taken for " in attributes.get("title", ""):
            true, rest = attributes["title"].split(" taken for ")
            taken, count = rest.split(": ")
            cells[true, taken] = int(count), attributes["class"].split()
    assert {name for pair in cells for name in pair} <= set(names)
    return cells


def test_cells_hold_counts_and_only_confusions_that_happened_are_framed(make_data):
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    data = make_data(pairs=pairs, strength=1.0)
    best, labels = data.main.tuned.argmax(axis=1), data.main.labels
    found = read(data)
    cells = matrix(found, data.class_names)
    for true, name in enumerate(data.class_names):
        for taken, other in enumerate(data.class_names):
            count = int(((labels == true) & (best == taken)).sum())
            shade = -(-10 * (count / 15) ** 0.5 // 1)
            if not count:
                assert (name, other) not in cells
                continue
            classes = [f"s{shade:.0f}"] + ["mined"] * (true != taken)
            assert cells[name, other] == (count, classes)
            assert f">{count}</td>" in render_html(find_results(data, ""))
    assert any("mined" in classes for _, classes in cells.values())
    assert "Framed" in found.text and "Framed" not in read(replace(data, pairs=[])).text


def test_up_to_a_hundred_classes_are_all_named(make_data):
    names = tuple(f"class {index}" for index in range(100))
    found = read(make_data(images=200, names=names, strength=1.0))
    heads = [cell for cell in found.all("th") if cell.get("title", "").startswith("class ")]
    assert {cell["title"] for cell in heads} == set(names)
    more = tuple(f"class {index}" for index in range(120))
    found = read(make_data(images=240, names=more, strength=1.0))
    assert "most confused of 120 classes" in " ".join(found.text.split())
    assert len([cell for cell in found.all("th") if cell.get("title", "")]) <= 100


def test_of_many_classes_the_least_accurate_are_listed(make_data, monkeypatch):
    monkeypatch.setattr("capt_deploy.report.tables._MOST_ROWS", 3)
    results = find_results(make_data(strength=0.0), "One")
    shown = "The 3 least accurate of 4 classes; report.json has all, among all classes"
    found = render_markdown(results)
    assert shown in found and shown in read(make_data(strength=0.0)).text
    *_, classes = (part for part in found.split("\n\n") if part.startswith("| class "))
    worst = sorted(results.classes, key=lambda row: row.accuracy)[:3]
    assert [line.split("|")[1].strip() for line in classes.splitlines()[2:]] == [
        row.name for row in worst
    ]
    assert len(as_json(results)["classes"]) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b", r"a\|b"),
        ("<script>&", "&lt;script&gt;&amp;"),
        ("aquarium_fish *x* `y` [z](u)", r"aquarium\_fish \*x\* \`y\` \[z\](u)"),
        ("back\\slash", "back\\\\slash"),
        (" a  b\n", "a b"),
        ("水族館 0.5", "水族館 0.5"),
    ],
)
def test_what_markdown_would_read_otherwise_is_escaped(text, expected):
    assert escape_markdown(text) == expected


def test_all_rows_of_a_table_have_as_many_cells(make_data):
    data = make_data(names=("a|b", "c", "d", "e"), tuned=(True, True, False, False))
    found = render_markdown(find_results(data, "One"))
    assert found.startswith("<!-- capt-eval report ") and "\n\n# One\n\nRight on " in found
    tables = [part.splitlines() for part in found.split("\n\n") if part.startswith("| ")]
    assert len(tables) == 4
    for lines in tables:
        cells = {line.replace(r"\|", "").count("|") for line in lines}
        assert len(cells) == 1
    assert "| versions / numpy | 2 |" in found and "| classes | 1, 2 |" in found
