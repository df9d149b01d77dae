"""Classes and pairs, counted by hand; and classes that are confused stand together."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from capt_deploy.confidence.calibration import Calibration
from capt_deploy.evaluation.evaluate import Scores
from capt_deploy.report.confusions import (
    ConfusedPair,
    class_rows,
    confused_pairs,
    count_confusions,
    order_by_confusion,
)
from capt_deploy.report.measure import Predictions, predict

LABELS = np.array([0, 0, 0, 1, 1, 3])
MAIN = np.array(
    [
        [0.8, 0.1, 0.1, 0.0],
        [0.2, 0.6, 0.2, 0.0],  # cat taken for dog
        [0.1, 0.7, 0.2, 0.0],  # again
        [0.0, 0.9, 0.1, 0.0],
        [0.0, 1.0, 0.0, 0.0],
        [0.5, 0.1, 0.2, 0.2],  # hen taken for cat
    ]
)
BEFORE = np.eye(4)[[0, 0, 2, 1, 0, 0]]


def test_counts_are_of_true_and_predicted_class():
    counts, before = count_confusions(Predictions(LABELS, MAIN, None))
    assert before is None
    assert counts == {(0, 0): 1, (0, 1): 2, (1, 1): 2, (3, 0): 1}


def test_rows_are_of_classes_with_images_the_worst_first(make_data):
    data = make_data(tuned=(True, True, False, False))
    hen, cat, dog = class_rows(data, Predictions(LABELS, MAIN, BEFORE))
    assert [row.name for row in (hen, cat, dog)] == ["hen", "cat", "dog"]  # no cow
    assert (cat.images, cat.accuracy, cat.mistake, cat.mistaken) == (3, 1 / 3, "dog", 2)
    assert cat.confidence == pytest.approx((0.8 + 0.6 + 0.7) / 3)
    assert (cat.zero_shot, dog.zero_shot, hen.zero_shot) == (2 / 3, 1 / 2, 0)
    assert (dog.accuracy, dog.mistake, dog.mistaken) == (1, None, 0)
    assert (hen.tuned, cat.tuned) == (False, True)
    assert class_rows(data, Predictions(LABELS, MAIN, None))[0].zero_shot is None


def test_pairs_are_the_main_models_worst_and_mined_ones_are_known(make_data):
    data = make_data()
    assert confused_pairs(data, Predictions(LABELS, MAIN, BEFORE)) == [
        ConfusedPair("cat", "dog", 0, 2, mined=True),
        ConfusedPair("hen", "cat", 1, 1, mined=False),
    ]
    assert confused_pairs(data, Predictions(LABELS, MAIN, None))[0].zero_shot is None
    assert confused_pairs(data, Predictions(LABELS, np.eye(4)[LABELS], BEFORE)) == []


def test_predictions_are_calibrated_with_the_factors_of_the_tuned_model_alone(make_data):
    logits = np.array([[2.0, 1.0], [1.0, 3.0]])
    scores = Scores(np.array([0, 1]), logits, logits, Calibration(factors=(1.0, 0.5)))
    found = predict(make_data(2, ("a", "b"), scores={"tuned": scores}))
    assert found.zero_shot[1, 1] == pytest.approx(1 / (1 + np.exp(-2)))
    assert found.main[1, 1] == pytest.approx(1 / (1 + np.exp(-1)))
    assert found.main[0, 0] == pytest.approx(1 / (1 + np.exp(-1)))


def order_of(classes, pairs, most):
    counts = Counter({(true, true): 100 for true in range(classes)} | pairs)
    return order_by_confusion(counts, classes, most)


def test_confused_classes_become_neighbours():
    order = order_of(6, {(0, 5): 9, (5, 3): 8, (1, 4): 7}, 10)
    assert sorted(order) == list(range(6))
    place = {index: number for number, index in enumerate(order)}
    assert abs(place[0] - place[5]) == abs(place[5] - place[3]) == abs(place[1] - place[4]) == 1


def test_groups_are_joined_at_their_near_ends():
    # 0-1 and 2-3 are worst; then 0 with 3, which must be neighbours as well: 1 0 3 2.
    order = order_of(4, {(0, 1): 9, (2, 3): 8, (3, 0): 5}, 4)
    assert order in ([1, 0, 3, 2], [2, 3, 0, 1])


def test_both_directions_of_a_pair_count():
    # 4 + 4 images between 0 and 2 outweigh 7 between 0 and 1 or between 2 and 1.
    order = order_of(3, {(0, 2): 4, (2, 0): 4, (0, 1): 7}, 2)
    assert sorted(order) == [0, 2]


def test_the_worst_classes_are_taken_where_there_are_too_many():
    pairs = {(7, 30): 9, (30, 8): 8, (40, 41): 7}
    assert sorted(order_of(50, pairs, 3)) == [7, 8, 30]
    assert sorted(order_of(50, pairs, 49)) == [7, 8, 30, 40, 41]


def test_without_mistakes_few_classes_keep_their_order():
    assert order_of(3, {}, 5) == [0, 1, 2]


@given(arrays.arrays(np.int64, (7, 7), elements=st.integers(0, 3)), st.integers(2, 9))
def test_no_class_is_lost_or_shown_twice(counts, most):
    order = order_by_confusion(Counter(dict(np.ndenumerate(counts))), 7, most)
    assert len(set(order)) == len(order) <= most
    if most >= 7:
        assert sorted(order) == list(range(7))
