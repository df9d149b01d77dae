"""Sets and rejection on a page, against counting by hand."""

import numpy as np
import pytest

from capt_deploy.confidence.decisions import DecisionOptions, Decisions
from capt_deploy.evaluation.evaluate import Evaluation
from capt_deploy.metrics.calibration import softmax
from capt_deploy.report.measure import predict
from capt_deploy.report.page import render_markdown
from capt_deploy.report.promises import _verdict, promises
from capt_deploy.report.results import find_results
from capt_deploy.report.tables import promise_table

HALF = (True, True, False, False)


@pytest.fixture
def data(make_data) -> Evaluation:
    known = make_data(images=400, strength=2.0).main
    decisions = Decisions.from_validation(softmax(known.tuned), known.tuned, known.labels)
    return make_data(images=200, tuned=HALF, decisions=decisions)


def test_they_are_what_counting_finds(data: Evaluation) -> None:
    measured = promises(data, predict(data))
    found = {(promise.kind, promise.promised, promise.scope): promise for promise in measured}
    assert {scope for *_, scope in found} == {"base", "new"}
    probabilities = softmax(data.main.tuned)
    for scope, columns in (("base", [0, 1]), ("new", [2, 3])):
        rows = [row for row, label in enumerate(data.main.labels) if label in columns]
        inside, labels = probabilities[rows], data.main.labels[rows]
        for coverage in (0.8, 0.9, 0.95):
            options = DecisionOptions(coverage=coverage)
            sets = data.decisions.decide(inside, inside, options).sets
            held = [sets[row, label] for row, label in enumerate(labels)]
            promise = found["coverage", coverage, scope]
            assert promise.measured == pytest.approx(np.mean(held))
            assert promise.size == pytest.approx(sets.sum() / len(rows))
            assert promise.verdict == "kept" or promise.measured < coverage
        promise = found["accuracy", 0.9, scope]
        decided = data.decisions.decide(inside, inside, DecisionOptions(accuracy=0.9)).rejected
        assert promise.accepted == pytest.approx(1 - decided.mean())
        right = inside.argmax(axis=1) == labels
        assert promise.measured == pytest.approx(right[~decided].mean())


def test_what_cannot_be_promised_is_said(make_data) -> None:
    logits = np.random.default_rng(0).normal(size=(40, 4))
    unsure = Decisions.from_validation(softmax(logits), logits, np.arange(40) % 4)
    table = promise_table(find_results(make_data(decisions=unsure), ""))
    assert table.header == ["promise", "on these photos"]
    assert [row[1] for row in table.rows[3:]] == ["cannot be promised"] * 4


@pytest.mark.parametrize(("right", "verdict"), [(90, "kept"), (89, "kept within chance")])
def test_a_promise_is_broken_where_chance_does_not_explain_it(right: int, verdict: str) -> None:
    images = np.arange(100)
    assert _verdict(0.9, images < right) == verdict
    assert _verdict(0.9, images < 80) == "not kept"


def test_the_page_has_them_where_they_are_known(data: Evaluation, make_data) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    text = render_markdown(find_results(data, ""))
    assert "## Sets and rejection" in text
    assert "true class in the set: 90 %" in text
    without = make_data(tuned=HALF)
    assert "## Sets and rejection" not in render_markdown(find_results(without, ""))
