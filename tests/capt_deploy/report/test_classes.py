"""Classes and pairs, counted by hand."""

import numpy as np
import pytest

from capt_deploy.report.classes import (
    ConfusedPair,
    Joint,
    class_rows,
    confused_pairs,
    confusion_counts,
    joint,
)
from capt_deploy.report.data import Answers

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
    assert confusion_counts(LABELS, MAIN).tolist() == [
        [1, 2, 0, 0],
        [0, 2, 0, 0],
        [0, 0, 0, 0],
        [1, 0, 0, 0],
    ]


def test_rows_are_of_classes_with_images_the_worst_first(make_data):
    data = make_data(tuned=(True, True, False, False))
    hen, cat, dog = class_rows(data, Joint(LABELS, MAIN, BEFORE))
    assert [row.name for row in (hen, cat, dog)] == ["hen", "cat", "dog"]  # no cow
    assert (cat.images, cat.accuracy, cat.mistake, cat.mistaken) == (3, 1 / 3, "dog", 2)
    assert cat.confidence == pytest.approx((0.8 + 0.6 + 0.7) / 3)
    assert (cat.zero_shot, dog.zero_shot, hen.zero_shot) == (2 / 3, 1 / 2, 0)
    assert (dog.accuracy, dog.mistake, dog.mistaken) == (1, None, 0)
    assert (hen.tuned, cat.tuned) == (False, True)
    assert class_rows(data, Joint(LABELS, MAIN, None))[0].zero_shot is None


def test_pairs_are_the_main_models_worst_and_mined_ones_are_known(make_data):
    data = make_data()
    assert confused_pairs(data, Joint(LABELS, MAIN, BEFORE)) == [
        ConfusedPair("cat", "dog", 0, 2, mined=True),
        ConfusedPair("hen", "cat", 1, 1, mined=False),
    ]
    assert confused_pairs(data, Joint(LABELS, MAIN, None))[0].zero_shot is None
    assert confused_pairs(data, Joint(LABELS, np.eye(4)[LABELS], BEFORE)) == []


def test_the_joint_answers_have_the_factors_of_each_model(make_data):
    logits = np.array([[2.0, 1.0], [1.0, 3.0]])
    models = [
        Answers("zero-shot", logits, 1.0),
        Answers("tuned", logits, 1.0, np.array([1.0, 0.5])),
    ]
    data = make_data(2, ("a", "b"), models=models)
    found = joint(data)
    assert found.zero_shot[1, 1] == pytest.approx(1 / (1 + np.exp(-2)))
    assert found.main[1, 1] == pytest.approx(1 / (1 + np.exp(-1)))
    assert found.main[0, 0] == pytest.approx(1 / (1 + np.exp(-1)))
