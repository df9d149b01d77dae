from __future__ import annotations

import math

import numpy as np
import pytest

from capt_deploy.confidence.vector_scaling import VectorScaling

OWN = VectorScaling((2.0, 0.5, 1.0), (0.25, -1.0, 0.0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_each_class_has_its_own_factor_and_offset(dtype: type) -> None:
    logits = np.random.default_rng(0).normal(size=(6, 3)).astype(dtype)
    found = OWN.applied(logits)
    assert found.dtype == np.float64
    for row in range(6):
        for column, (scale, bias) in enumerate(zip(OWN.scales, OWN.biases, strict=True)):
            assert found[row, column] == pytest.approx(scale * float(logits[row, column]) + bias)
    np.testing.assert_allclose(OWN.undone(found), logits, atol=1e-12)


def test_classes_of_a_list_keep_theirs_and_new_ones_are_neutral() -> None:
    assert OWN.chosen((2, 0)) == VectorScaling((1.0, 2.0), (0.0, 0.25))
    assert OWN.chosen((1, 3, 7)) == VectorScaling((0.5, 1.0, 1.0), (-1.0, 0.0, 0.0))
    logits = np.array([[1.0, 2.0, 3.0]])
    places = [2, 0, 1]
    np.testing.assert_array_equal(
        OWN.chosen(places).applied(logits[:, places]), OWN.applied(logits)[:, places]
    )


@pytest.mark.parametrize(
    ("scales", "biases"),
    [
        ((1.0,), (0.0, 0.0)),
        ((0.0,), (0.0,)),
        ((-1.0,), (0.0,)),
        ((math.nan,), (0.0,)),
        ((math.inf,), (0.0,)),
        ((1.0,), (math.nan,)),
    ],
)
def test_what_cannot_be_undone_is_refused(
    scales: tuple[float, ...], biases: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="vector scaling"):
        VectorScaling(scales, biases)


def test_logits_of_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        OWN.applied(np.zeros((4, 2)))
