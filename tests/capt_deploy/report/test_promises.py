"""Sets and rejection on a page, against counting by hand."""

from dataclasses import replace

import numpy as np
import pytest

from capt_deploy.confidence.decisions import DecisionOptions, Decisions
from capt_deploy.metrics.calibration import softmax
from capt_deploy.report.contents import find_contents
from capt_deploy.report.data import ReportData
from capt_deploy.report.markdown import markdown
from capt_deploy.report.promises import promises
from capt_deploy.report.texts import promise_table

HALF = (True, True, False, False)


@pytest.fixture
def data(make_data) -> ReportData:
    own = make_data(images=200, tuned=HALF)
    known = make_data(images=400, strength=2.0)
    logits = known.main.logits
    decisions = Decisions.of(softmax(logits), logits, known.labels)
    return replace(own, decisions=decisions)


def test_they_are_what_counting_finds(data: ReportData) -> None:
    found = {(own.kind, own.wanted, own.scope): own for own in promises(data)}
    assert {scope for *_, scope in found} == {"base", "new"}
    probabilities = softmax(data.main.logits)
    for scope, columns in (("base", [0, 1]), ("new", [2, 3])):
        rows = [row for row, label in enumerate(data.labels) if label in columns]
        own, labels = probabilities[rows], data.labels[rows]
        for coverage in (0.8, 0.9, 0.95):
            options = DecisionOptions(coverage=coverage)
            sets = data.decisions.decide(own, own, options).sets
            held = [sets[row, label] for row, label in enumerate(labels)]
            promise = found["coverage", coverage, scope]
            assert promise.found == pytest.approx(np.mean(held))
            assert promise.size == pytest.approx(sets.sum() / len(rows))
        promise = found["accuracy", 0.9, scope]
        decided = data.decisions.decide(own, own, DecisionOptions(accuracy=0.9)).rejected
        assert promise.accepted == pytest.approx(1 - decided.mean())
        right = own.argmax(axis=1) == labels
        assert promise.found == pytest.approx(right[~decided].mean())


def test_what_cannot_be_promised_is_said(make_data) -> None:
    logits = np.random.default_rng(0).normal(size=(40, 4))
    unsure = Decisions.of(softmax(logits), logits, np.arange(40) % 4)
    header, rows = promise_table(find_contents(make_data(decisions=unsure)))
    assert header == ["wanted", "all"]
    assert [row[1] for row in rows[3:]] == ["cannot be promised"] * 4


def test_the_page_has_them_where_they_are_known(data: ReportData, make_data) -> None:
    text = markdown(data, find_contents(data))
    assert "## Sets and rejection" in text
    assert "sets that hold it in 90.0 %" in text
    without = make_data(tuned=HALF)
    assert "## Sets and rejection" not in markdown(without, find_contents(without))
