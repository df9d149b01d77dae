"""The figures agree with each other and with formulas written anew."""

from dataclasses import replace

import numpy as np
import pytest

from capt_deploy.confidence.calibration import Calibration, TopLabelMap, VectorScaling
from capt_deploy.evaluation.evaluate import Scores
from capt_deploy.metrics.calibration import (
    expected_calibration_error,
    negative_log_likelihood,
    softmax,
)
from capt_deploy.metrics.reliability import reliability
from capt_deploy.report.measure import measure_models, scope_columns

HALF = (True, True, False, False)


def measure_main(data):
    return measure_models(data)[-1]


def test_scopes_are_those_that_have_images(make_data):
    data = make_data(tuned=HALF)
    found = {scope: columns.tolist() for scope, columns in scope_columns(data).items()}
    assert found == {"base": [0, 1], "new": [2, 3], "all": [0, 1, 2, 3]}
    new = data.main.labels >= 2
    part = replace(data, scores={"tuned": data.main.rows(np.flatnonzero(new))})
    assert list(scope_columns(part)) == ["new", "all"]


@pytest.mark.parametrize("tuned", [True, False])
def test_where_all_classes_are_alike_there_is_one_scope(make_data, tuned):
    assert list(scope_columns(make_data(tuned=(tuned,) * 4))) == ["all"]


def test_probabilities_are_among_the_own_classes_with_their_factors():
    logits = np.array([[1.0, 2.0, 9.0], [0.5, 0.2, 0.1], [3.0, 1.0, 2.0]])
    calibration = Calibration(factors=(1.0, 1.0, 0.5))
    scores = Scores(np.array([2, 0, 1]), logits, None, calibration)
    found, labels = scores.among(np.array([1, 2]))
    expected = np.array([[2.0, 9.0], [1.0, 2.0]]) * 0.5
    assert np.allclose(found, softmax(expected))
    assert labels.tolist() == [1, 0]


def test_the_map_of_the_top_label_counts_after_calibration_alone(make_data):
    data = make_data(images=300, tuned=HALF)
    steep = TopLabelMap((0.0,), (0.5,), 2.0, 2.0)
    vector = VectorScaling((1.0, 2.0, 0.5, 1.0), (0.0, 1.0, -1.0, 0.0))
    raw = data.main.calibration.unscale(data.main.tuned)
    calibration = Calibration(2.0, vector, steep)
    scores = Scores(data.main.labels, calibration.scale(raw), None, calibration)
    (found,) = measure_models(replace(data, scores={"tuned": scores}))
    columns = np.flatnonzero(data.tuned)
    rows = np.isin(scores.labels, columns)
    labels = np.searchsorted(columns, scores.labels[rows])
    mapped = softmax(steep.shift(scores.tuned[rows][:, columns]))
    before = softmax(raw[rows][:, columns])
    assert found.report["base"]["ece_15"] == expected_calibration_error(mapped, labels)
    assert found.report["uncalibrated"]["base"]["nll"] == pytest.approx(
        negative_log_likelihood(before, labels)
    )
    assert np.allclose(found.after["base"].counts, reliability(mapped, labels).counts)
    assert np.allclose(found.before["base"].counts, reliability(before, labels).counts)


def test_diagrams_and_curves_are_of_what_the_table_says(make_data):
    data = make_data(images=200, tuned=HALF)
    calibration = Calibration(0.8, factors=(1, 1, 0.7, 0.8))
    tuned = replace(data.main, calibration=calibration)
    data = replace(data, scores={"tuned": tuned})
    found = measure_main(data)
    for scope in ("base", "new", "all"):
        for part, curve in (
            (found.report, found.after),
            (found.report["uncalibrated"], found.before),
        ):
            bins = curve[scope]
            full = bins.counts > 0
            gaps = bins.counts[full] * np.abs(bins.confidence[full] - bins.accuracy[full])
            assert gaps.sum() / bins.counts.sum() == pytest.approx(part[scope]["ece_15"])
        coverage, risk = found.risks[scope]
        assert coverage[-1] == 1
        assert risk[-1] == pytest.approx(1 - found.report[scope]["accuracy"])
        mean, quantile = found.chance[scope]
        assert 0 < mean < quantile < 0.5
    all_of_them = softmax(calibration.weigh(tuned.tuned))
    assert found.report["all"]["accuracy"] == np.mean(all_of_them.argmax(axis=1) == tuned.labels)


def test_intervals_are_those_of_resampled_images(make_data):
    data = make_data(images=400, tuned=HALF, strength=1.0)
    found = measure_main(data)
    rng = np.random.default_rng(7)
    shares = {}
    for scope, columns in scope_columns(data).items():
        probabilities, labels = data.main.among(columns)
        right = probabilities.argmax(axis=1) == labels
        shares[scope] = rng.binomial(len(right), right.mean(), 20_000) / len(right)
    shares["harmonic_mean"] = 2 / (1 / shares["base"] + 1 / shares["new"])
    assert set(found.intervals) == set(shares)
    for name, share in shares.items():
        assert found.intervals[name] == pytest.approx(np.quantile(share, [0.025, 0.975]), abs=0.012)


def test_that_every_image_is_right_does_not_say_that_every_other_one_would_be(make_data):
    data = make_data(strength=50, tuned=HALF)
    found = measure_main(data)
    assert set(found.intervals) == {"base", "new", "harmonic_mean", "all"}
    for low, high in found.intervals.values():
        assert 0.5 < low < 0.99
        assert high == 1
    few, many = (found.intervals[name][0] for name in ("base", "all"))
    assert few < many


def test_a_part_that_is_all_right_still_counts_in_the_harmonic_mean(make_data):
    data = make_data(images=200, tuned=HALF)
    labels = data.main.labels
    sure = np.where(labels[:, np.newaxis] < 2, 50 * np.eye(4)[labels], data.main.tuned)
    found = measure_main(replace(data, scores={"tuned": replace(data.main, tuned=sure)}))
    assert found.intervals["base"][1] == 1
    low, high = found.intervals["harmonic_mean"]
    assert low < found.report["harmonic_mean"] < high
