"""Reports as text: what exists gets a column, and a loss of accuracy is not kept quiet."""

from typing import Any

import numpy as np

from capt_deploy.evaluation.evaluate import Scores, evaluate
from capt_deploy.evaluation.summary import (
    confused_pairs_table,
    curve_notes,
    summary,
    worse_than_zero_shot,
)

NAMES = ("ape", "bee", "cow")


def report(before: list[int], after: list[int], tuned: list[bool], **more: Any) -> dict[str, Any]:
    """Return a real report on images of ape, ape, bee, cow, cow."""
    hot = np.eye(3) * 50
    given = Scores(np.array([0, 0, 1, 2, 2]), hot[after], hot[before])
    return {**evaluate(given, NAMES, tuned, [(0, 1)]), "skipped": [], **more}


BETTER = report([1, 1, 1, 2, 0], [0, 1, 1, 2, 2], [True, True, False])
WORSE = report([0, 0, 1, 2, 2], [1, 0, 1, 2, 2], [True, True, True])


def test_the_table_sets_tuned_beside_zero_shot() -> None:
    lines = summary(BETTER).split("\n")
    # of base (ape, ape, bee) 1 and 2 of 3 are right, new (cow) has but one column
    assert lines[0] == "%          base    new  harmonic   all  ECE base  ECE new  ECE all"
    assert lines[2].split() == ["zero-shot", "33.3", "100.0", "50.0", "40.0", "66.7", "0.0", "60.0"]
    assert lines[3].split() == ["tuned", "66.7", "100.0", "80.0", "80.0", "33.3", "0.0", "20.0"]
    assert lines[4].endswith("; base: classes tuned on, new: the others")
    assert lines[5:] == [
        "tuning corrects 1 of the 2 images (50.0 %) in which zero-shot makes a mistake known from "
        "training",
        "tuning breaks 0 of the 1 image (0.0 %) that zero-shot gets right",
    ]


def test_columns_that_do_not_exist_are_left_out() -> None:
    lines = summary(WORSE).split("\n")
    assert lines[0].split() == ["%", "all", "ECE", "all"]
    assert lines[2].split() == ["zero-shot", "100.0", "0.0"]
    assert lines[3].split() == ["tuned", "80.0", "20.0"]


def test_worse_than_zero_shot_is_a_warning_for_that_scope() -> None:
    sentence = "tuned is less accurate than zero-shot on all classes: 80.0 % < 100.0 %"
    assert worse_than_zero_shot(WORSE) == [sentence]
    assert f"WARNING: {sentence}" in summary(WORSE).split("\n")
    assert worse_than_zero_shot(BETTER) == []
    assert "WARNING" not in summary(BETTER)


def test_equal_accuracy_is_no_warning() -> None:
    assert worse_than_zero_shot(report([0, 1, 1, 2, 2], [1, 0, 1, 2, 2], [True] * 3)) == []


def test_nothing_is_said_of_no_images() -> None:
    text = summary(WORSE)  # zero-shot makes no mistake
    assert "tuning breaks 1 of the 5 images (20.0 %) that zero-shot gets right" in text
    assert "corrects" not in text and "base:" not in text
    never_right = summary(report([1, 1, 2, 0, 0], [0, 0, 1, 2, 2], [True] * 3))
    assert "tuning corrects 2 of the 2 images (100.0 %)" in never_right
    assert "breaks" not in never_right


def test_unreadable_images_are_counted_and_the_first_named() -> None:
    skipped = [[f"a/{number}.jpg", "truncated"] for number in range(5)]
    text = summary({**BETTER, "skipped": skipped})
    assert text.endswith("\nleft out 5 files or folders: a/0.jpg, a/1.jpg, a/2.jpg, …")
    text = summary({**BETTER, "skipped": skipped[:1]})
    assert text.endswith("\nleft out 1 file or folder: a/0.jpg")


def test_confused_pairs_are_listed_worst_first() -> None:
    assert confused_pairs_table(BETTER).split("\n") == [
        "confused pair (images)  zero-shot  tuned",
        "----------------------  ---------  -----",
        "ape taken for bee               2      1",
    ]
    swapped = report([1, 1, 2, 0, 1], [0, 0, 1, 2, 2], [True] * 3)
    assert len(confused_pairs_table(swapped).split("\n")) == 2 + 4
    assert len(confused_pairs_table(swapped, most=3).split("\n")) == 2 + 3


def test_what_more_photos_bring_is_said_with_the_classes_that_gain() -> None:
    curve = {
        "photos": [4.0, 8.0, 12.0],
        "accuracy": [0.5, 0.6, 0.65],
        "twice": 24.0,
        "expected": 0.7,
        "low": 0.66,
        "high": 0.74,
        "gains": [{"class": "ape", "gain": 0.03}, {"class": "bee", "gain": 0.004}],
    }
    expected, gains = curve_notes(curve)
    assert "With 12 photos a class, 65.0 % of held-out photos are right" in expected
    assert "with 24, twice what there is, expect 70.0 % (66.0 to 74.0 %)" in expected
    assert "ape (+3.0 points)" in gains and "bee" not in gains
    assert len(curve_notes({**curve, "gains": curve["gains"][1:]})) == 1
