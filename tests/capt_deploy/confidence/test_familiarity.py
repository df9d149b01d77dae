"""Scores by hand and against SciPy, p-values by simulation."""

import math

import numpy as np
import pytest

from capt_deploy.confidence import familiarity
from capt_deploy.confidence.familiarity import FamiliarityTable


def test_scores_of_a_case_done_by_hand() -> None:
    logits = np.log(np.array([[1.0, 2.0, 5.0], [3.0, 0.5, 0.5]]))
    assert familiarity.negative_energy(logits) == pytest.approx([math.log(8), math.log(4)])


def test_energy_of_large_logits_is_finite_and_precise() -> None:
    for dtype in (np.float32, np.float64):
        logits = np.array([[5000.0, 5000.0], [-5000.0, -6000.0]], dtype)
        got = familiarity.negative_energy(logits)
        assert got.dtype == np.float64
        assert got == pytest.approx([5000 + math.log(2), -5000], rel=1e-12)


def test_energy_equals_scipys() -> None:
    special = pytest.importorskip("scipy.special", reason="SciPy is the oracle")
    logits = np.random.default_rng(0).normal(0, 30, (50, 12))
    expected = special.logsumexp(logits, axis=1)
    assert familiarity.negative_energy(logits) == pytest.approx(expected, rel=1e-13)


def test_p_values_of_a_case_done_by_hand() -> None:
    table = FamiliarityTable(np.array([4.0, 1.0, 2.0, 2.0]))
    got = table.p_value(np.array([0.5, 1.0, 2.0, 3.0, 9.0]))
    assert got.tolist() == [1 / 5, 2 / 5, 4 / 5, 4 / 5, 1]
    assert float(table.p_value(2.0)) == 4 / 5


def test_p_values_of_known_images_are_no_smaller_than_they_say() -> None:
    random = np.random.default_rng(0)
    calibration = random.gumbel(size=(2000, 19))
    scores = random.gumbel(size=2000)
    values = np.array(
        [
            float(FamiliarityTable(own).p_value(s))
            for own, s in zip(calibration, scores, strict=True)
        ]
    )
    for level in (0.05, 0.1, 0.5):  # multiples of 1/20, where the share is exactly that
        deviation = math.sqrt(level * (1 - level) / 2000)
        assert abs(np.mean(values <= level + 1e-12) - level) < 3.5 * deviation


def test_a_table_survives_its_arrays() -> None:
    table = FamiliarityTable(np.random.default_rng(0).normal(size=50).astype(np.float32))
    again = FamiliarityTable.from_arrays(table.arrays())
    np.testing.assert_array_equal(again.scores, table.scores)
    assert table.p_value(table.scores[0]) == 2 / 51, "a float32 score equals itself in the table"


@pytest.mark.parametrize("wrong", [np.empty(0), np.array([1.0, np.nan]), np.ones((2, 2))])
def test_scores_that_say_nothing_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="at least one"):
        FamiliarityTable(wrong)
    with pytest.raises(ValueError, match="NaN"):
        FamiliarityTable(np.ones(2)).p_value(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="scores"):
        FamiliarityTable.from_arrays({"scores": wrong})
