"""Arrays of a bundle are taken only as what they should be."""

import numpy as np
import pytest

from capt_deploy.confidence.stored_arrays import read_array

ARRAYS = {
    "floats": np.array([0.5, 1.0], np.float32),
    "integers": np.array([1, 2, 3]),
    "booleans": np.array([True]),
    "empty": np.empty(0),
    "matrix": np.ones((2, 2)),
    "infinite": np.array([1.0, np.inf]),
    "missing_number": np.array([np.nan]),
}


def test_good_arrays_come_as_they_are() -> None:
    assert read_array(ARRAYS, "floats", "f") is ARRAYS["floats"]
    assert read_array(ARRAYS, "integers", "i", 3) is ARRAYS["integers"]
    assert read_array(ARRAYS, "booleans", "b") is ARRAYS["booleans"]


@pytest.mark.parametrize(
    ("name", "kind", "length", "words"),
    [
        ("other", "f", None, "'other'.*booleans"),
        ("floats", "i", None, "floats: expected at least one integer.s. .* float32"),
        ("integers", "i", 2, r"expected 2 integer.s. .* \(3,\)"),
        ("empty", "f", None, r"at least one float.s. .* \(0,\)"),
        ("matrix", "f", None, r"one axis, came float64 \(2, 2\)"),
        ("infinite", "f", 2, "infinity"),
        ("missing_number", "f", 1, "NaN"),
    ],
)
def test_others_are_refused_in_words(name: str, kind: str, length: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_array(ARRAYS, name, kind, length)
