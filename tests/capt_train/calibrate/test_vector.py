"""Against another optimiser on the same objective, written out class by class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp

from capt_train.calibrate.choose import fit_calibration
from capt_train.calibrate.vector import fit_vector


def drawn(
    seed: int, images: int, classes: int = 4, a: Any = 1.0, b: Any = 0.0
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return logits z, and labels drawn from softmax(a·z + b)."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (images, classes))
    scores = a * logits + b + random.gumbel(size=logits.shape)
    return logits, scores.argmax(axis=1)


def objective(values: NDArray[Any], logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Σ −log p(y) + Σ (log a)²/(2·0.1²) + Σ b²/(2·0.5²) + u²/(2·0.5²)."""
    classes = logits.shape[1]
    logs, biases, common = values[:classes], values[classes:-1], values[-1]
    scaled = np.exp(common) * np.exp(logs) * logits + biases
    own = scaled[np.arange(len(labels)), labels]
    nll = (logsumexp(scaled, axis=1) - own).sum()
    priors = ((logs / 0.1) ** 2).sum() + ((biases / 0.5) ** 2).sum() + (common / 0.5) ** 2
    return float(nll + priors / 2)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), images=st.integers(1, 120), size=st.sampled_from([0.3, 1.0, 5.0]))
def test_another_optimiser_finds_the_same(seed: int, images: int, size: float) -> None:
    logits, labels = drawn(seed, images)
    logits = logits * size
    found = minimize(
        objective, np.zeros(9), (logits, labels), method="BFGS", options={"gtol": 1e-7}
    ).x
    logs, biases, common = found[:4], found[4:8], found[8]
    scale = np.exp(common + logs.mean())
    found_vector = fit_vector(logits, labels)
    a, b = np.array(found_vector.scales), np.array(found_vector.biases)
    np.testing.assert_allclose(a, np.exp(logs - logs.mean()), atol=2e-3)
    np.testing.assert_allclose(b, (biases - biases.mean()) / scale, atol=2e-2 / scale)
    # what is returned is the best model, but for the common factor
    expected = scale * (a * logits + b)
    given_up = np.exp(common + logs) * logits + biases
    differences = (expected - given_up) - (expected - given_up).mean(axis=1, keepdims=True)
    assert np.abs(differences).max() < 0.05


@pytest.mark.parametrize("images", [1, 30, 300])
def test_factors_and_offsets_leave_the_common_part_to_the_temperature(images: int) -> None:
    vector = fit_vector(*drawn(1, images))
    a, b = np.array(vector.scales), np.array(vector.biases)
    assert a.shape == b.shape == (4,)
    assert np.log(a).mean() == pytest.approx(0, abs=1e-12)
    assert b.mean() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 4.0])
def test_biased_classes_are_found_whatever_the_temperature_is(sharpness: float) -> None:
    bias = np.array([1.5, 0.0, -0.5, -1.0])
    logits, labels = drawn(2, 8000, b=bias)
    sharp = logits * sharpness  # z; right is softmax(z/sharpness + bias)
    own = fit_calibration("vector", sharp, labels)
    assert own.vector is not None
    assert own.temperature == pytest.approx(sharpness, rel=0.05)
    # z becomes (a·z + b)/T: b is in units of z
    np.testing.assert_allclose(np.array(own.vector.biases) / sharpness, bias, atol=0.12)
    np.testing.assert_allclose(own.vector.scales, 1, atol=0.06)
    wanted = logits + bias
    wanted = np.exp(wanted - logsumexp(wanted, axis=1, keepdims=True))
    assert np.abs(own.apply(sharp)[1] - wanted).mean() < 0.01


def test_classes_of_their_own_sharpness_are_found() -> None:
    a = np.array([1.25, 1.1, 0.9, 0.8])
    own = np.array(fit_vector(*drawn(3, 20_000, a=a)).scales)
    np.testing.assert_allclose(own, a / np.exp(np.log(a).mean()), atol=0.05)


@pytest.mark.parametrize("images", [1, 8, 60, 600])
@pytest.mark.parametrize("kind", ["right", "wrong", "noise"])
def test_nothing_explodes(images: int, kind: str) -> None:
    logits, _ = drawn(4, images)
    noise = np.random.default_rng(0).integers(0, 4, images)
    labels = {"right": logits.argmax(axis=1), "wrong": logits.argmin(axis=1), "noise": noise}[kind]
    own = fit_calibration("vector", logits, labels)
    assert own.vector is not None
    assert np.abs(np.array(own.vector.biases) / own.temperature).max() < 3
    assert 0.5 < min(own.vector.scales) <= max(own.vector.scales) < 2
    if kind != "right":
        assert own.apply(logits)[1].max() < 0.95
    elif images <= 8:
        assert own.apply(logits)[1].max(axis=1).min() < 0.99


def test_a_class_without_images_is_not_ruled_out() -> None:
    logits, labels = drawn(5, 60)
    kept = labels != 3
    own = fit_calibration("vector", logits[kept], labels[kept])
    assert own.vector is not None
    assert own.apply(logits)[1][:, 3].mean() > 0.01
    assert -4 < own.vector.biases[3] < 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_given_stays_as_it_is(dtype: type) -> None:
    logits, labels = drawn(6, 40)
    given_in = logits.astype(dtype)
    given_in.flags.writeable = False
    own = fit_calibration("vector", given_in, labels)
    again = fit_calibration("vector", given_in, labels)
    assert own == again
