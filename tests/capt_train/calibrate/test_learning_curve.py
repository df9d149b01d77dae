"""Errors that fall by a power of the photos are continued by that power."""

from __future__ import annotations

import json

import numpy as np
import pytest

from capt_train.calibrate.learning_curve import LearningCurve, fit_curve, mean_hits, thinned

NAMES = ("otter", "beaver", "mink")
COUNTS = np.array([16, 16, 4])


def hits(error: float, images: int = 1000) -> np.ndarray:
    return (np.arange(images) >= round(error * images)).astype(float)


def curve_of(*points: tuple[float, float], images: int = 1000) -> LearningCurve:
    labels = np.arange(images) % 3
    curve = fit_curve(
        [(float(n), hits(e, images)) for n, e in points], labels, COUNTS, NAMES, seed=1
    )
    assert curve is not None
    return curve


@pytest.mark.parametrize("exponent", [0.2, 0.5, 0.9])
def test_a_power_law_is_continued(exponent: float) -> None:
    curve = curve_of(*((n, 0.6 * n**-exponent) for n in (4.0, 8.0, 12.0)))
    assert curve.twice == 24
    assert curve.expected == pytest.approx(1 - 0.6 * 24**-exponent, abs=0.005)
    assert curve.low < curve.expected < curve.high
    assert curve.high - curve.low < 0.1


def test_more_photos_are_never_expected_to_harm_nor_to_do_wonders() -> None:
    assert curve_of((4, 0.2), (12, 0.3)).expected == pytest.approx(0.755, abs=0.01)
    steep = curve_of((4, 0.5), (12, 0.01))  # the errors fall by no more than 1/n from their middle
    assert steep.expected == pytest.approx(1 - np.sqrt(0.5 * 0.01 * 48) / 24, abs=0.005)


def test_few_photos_give_a_wide_interval() -> None:
    wide, narrow = (curve_of((4, 0.4), (12, 0.2), images=n) for n in (60, 6000))
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)


def test_classes_with_many_mistakes_and_few_photos_gain_most() -> None:
    labels = np.repeat([0, 1, 2], 100)
    right = np.concatenate([hits(0.1, 100), hits(0.4, 100), hits(0.4, 100)])
    curve = fit_curve([(4.0, right * 0.5), (8.0, right)], labels, COUNTS, NAMES, seed=1)
    assert curve is not None
    assert [name for name, *_ in curve.gains] == ["mink", "beaver", "otter"]
    assert [photos for _, photos, _ in curve.gains] == [4, 16, 16]
    gains = [gain for *_, gain in curve.gains]
    assert gains == sorted(gains, reverse=True)
    assert 0 < gains[-1] < gains[0] < 0.4
    assert LearningCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve


def test_one_number_of_photos_is_no_curve() -> None:
    labels = np.zeros(5, int)
    assert fit_curve([(3.0, hits(0.2, 5))] * 2, labels, COUNTS, NAMES, seed=1) is None


def test_thinning_keeps_a_share_of_each_class_and_at_least_one() -> None:
    labels = np.array([0] * 9 + [1] * 3 + [2])
    kept = thinned(labels, 1 / 3, np.random.default_rng(0))
    assert np.bincount(labels[kept]).tolist() == [3, 1, 1]
    assert thinned(labels, 1.0, np.random.default_rng(0)).all()


def test_hits_are_means_over_the_folds_that_judged_an_image() -> None:
    folds = [
        (np.array([1, 4]), np.array([True, False])),
        (np.array([4, 2]), np.array([True, True])),
    ]
    judged, share = mean_hits(6, folds)
    assert judged.tolist() == [1, 2, 4]
    assert share.tolist() == [1.0, 1.0, 0.5]
