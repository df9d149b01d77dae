"""Classes that are confused stand together."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from capt_deploy.report.order import confused_order


def counts_of(classes, pairs):
    counts = np.diag(np.full(classes, 100))
    for (true, taken), images in pairs.items():
        counts[true, taken] = images
    return counts


def test_confused_classes_become_neighbours():
    counts = counts_of(6, {(0, 5): 9, (5, 3): 8, (1, 4): 7})
    order = confused_order(counts, 10)
    assert sorted(order) == list(range(6))
    place = {index: number for number, index in enumerate(order)}
    assert abs(place[0] - place[5]) == abs(place[5] - place[3]) == abs(place[1] - place[4]) == 1


def test_groups_are_joined_at_their_near_ends():
    # 0-1 and 2-3 are worst; then 0 with 3, which must be neighbours as well: 1 0 3 2.
    counts = counts_of(4, {(0, 1): 9, (2, 3): 8, (3, 0): 5})
    assert confused_order(counts, 4) in ([1, 0, 3, 2], [2, 3, 0, 1])


def test_both_directions_of_a_pair_count():
    # 4 + 4 images between 0 and 2 outweigh 7 between 0 and 1 or between 2 and 1.
    counts = counts_of(3, {(0, 2): 4, (2, 0): 4, (0, 1): 7})
    order = confused_order(counts, 2)
    assert sorted(order) == [0, 2]


def test_the_worst_classes_are_taken_where_there_are_too_many():
    counts = counts_of(50, {(7, 30): 9, (30, 8): 8, (40, 41): 7})
    assert sorted(confused_order(counts, 3)) == [7, 8, 30]
    assert sorted(confused_order(counts, 49)) == [7, 8, 30, 40, 41]


def test_without_mistakes_few_classes_keep_their_order():
    assert confused_order(counts_of(3, {}), 5) == [0, 1, 2]


@given(arrays.arrays(np.int64, (7, 7), elements=st.integers(0, 3)), st.integers(2, 9))
def test_no_class_is_lost_or_shown_twice(counts, most):
    order = confused_order(counts, most)
    assert len(set(order)) == len(order) <= most
    if most >= 7:
        assert sorted(order) == list(range(7))
