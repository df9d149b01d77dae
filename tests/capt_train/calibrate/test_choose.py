"""Which calibration is taken, and that no image is judged by one that was fitted on it."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import logsumexp

from capt_deploy.confidence.calibration import Calibration, TopLabelMap, VectorScaling
from capt_deploy.metrics.calibration import softmax
from capt_train.calibrate import choose
from capt_train.calibrate.choose import (
    candidates,
    choose_calibration,
    cross_fitted,
    fit_calibration,
)
from capt_train.calibrate.temperature import fit_temperature
from capt_train.calibrators import CALIBRATORS
from capt_train.run.fitted import Fitted

CLASSES = 10
Drawn = tuple[NDArray[Any], NDArray[Any]]


def chances(logits: NDArray[Any]) -> NDArray[Any]:
    return np.exp(logits - logsumexp(logits, axis=1, keepdims=True))


def picked(random: np.random.Generator, probabilities: NDArray[Any]) -> NDArray[Any]:
    return (random.random((len(probabilities), 1)) > probabilities.cumsum(axis=1)).sum(axis=1)


def too_sharp(images: int, seed: int = 0) -> Drawn:
    """A temperature of 3 is all that is needed."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (images, CLASSES))
    return 3 * logits, picked(random, chances(logits))


def bent(images: int, seed: int = 0, slope: float = 0.35, offset: float = 1.2) -> Drawn:
    """The most probable class is right with σ(slope·ℓ + offset); the others share the rest."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (images, CLASSES))
    shares, rows = chances(logits), np.arange(images)
    best = shares.argmax(axis=1)
    odds = np.log(shares[rows, best] / (1 - shares[rows, best]))
    wanted = 1 / (1 + np.exp(-(slope * odds + offset)))
    shares[rows, best] = 0
    shares *= ((1 - wanted) / shares.sum(axis=1))[:, None]
    shares[rows, best] = wanted
    return logits, picked(random, shares)


def biased(images: int, seed: int = 0) -> Drawn:
    """Each class has an offset of its own."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (images, CLASSES))
    return logits - np.linspace(-2, 2, CLASSES), picked(random, chances(logits))


@pytest.mark.parametrize(
    ("data", "kinds"),
    [(too_sharp, {"temperature"}), (bent, {"line", "isotonic"}), (biased, {"vector"})],
)
@pytest.mark.parametrize("seed", range(2))
def test_the_calibration_that_the_data_need_is_taken(data: Any, kinds: set[str], seed: int) -> None:
    raw, labels = data(2000, seed)
    choice = choose_calibration(raw, labels)
    assert choice.calibration.calibrator in kinds
    assert choice.calibration == fit_calibration(choice.calibration.calibrator, raw, labels)
    fresh, truth = data(4000, seed + 100)

    def nll(own: Calibration) -> float:
        shares = own.apply(fresh)[1][np.arange(len(truth)), truth]
        return float(-np.log(shares).mean())

    assert (
        nll(choice.calibration)
        <= min(nll(fit_calibration(kind, raw, labels)) for kind in CALIBRATORS) + 0.01
    )


def test_a_line_is_simpler_than_a_map_with_many_knots() -> None:
    assert choose_calibration(*bent(3000)).calibration.calibrator == "line"


@pytest.mark.parametrize("images", [1, 5, 49])
def test_few_images_choose_the_first_kind_and_nothing_is_compared(images: int) -> None:
    raw, labels = bent(images)
    choice = choose_calibration(raw, labels)
    assert choice.calibration.calibrator == "temperature"
    assert choice.candidates == {}
    assert choose_calibration(raw, labels, ("line",)).calibration.calibrator == "line"
    for kind in CALIBRATORS:
        found = fit_calibration(kind, raw, labels).apply(raw)[1]
        np.testing.assert_allclose(found.sum(axis=1), 1)


def test_a_single_kind_is_not_compared_and_others_are_not_tried() -> None:
    raw, labels = biased(500)
    choice = choose_calibration(raw, labels, ("temperature",))
    assert (choice.calibration.calibrator, choice.candidates) == ("temperature", {})
    kinds = ("temperature", "line", "isotonic")
    assert set(choose_calibration(raw, labels, kinds).candidates) == {*kinds}


def losses(*rows: list[float]) -> dict[str, NDArray[Any]]:
    return {k: np.array(row * 25) for k, row in zip(CALIBRATORS, rows, strict=True)}


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        (losses([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]), "temperature"),
        # better for all images alike: no error at all
        (losses([1.1, 1.1], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]), "line"),
        (losses([1.1, 2.1], [1.1, 2.1], [1.05, 2.05], [1.0, 2.0]), "vector"),
        # 0.1 better in the mean, but ±1: its error is √(50/49)/√50 = 0.143
        (losses([1.0, 1.0], [1.9, -0.1], [1.9, 1.9], [1.9, 1.9]), "temperature"),
        # 0.15 is more than that
        (losses([1.0, 1.0], [1.85, -0.15], [1.9, 1.9], [1.9, 1.9]), "line"),
        # neither of the first two, but the third one, with the best one last
        (losses([1.5, 1.5], [1.4, 1.4], [1.0, 1.0], [1.9, -0.1]), "isotonic"),
    ],
)
def test_the_simplest_within_one_standard_error_by_hand(
    recorded: dict[str, NDArray[Any]], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "_held_out_losses", lambda kind, *_: recorded[kind])
    choice = choose_calibration(*too_sharp(50))
    assert choice.calibration.calibrator == expected
    best = min(recorded.values(), key=lambda own: own.sum())
    for kind, own in recorded.items():
        behind = [a - b for a, b in zip(own, best, strict=True)]
        mean = sum(behind) / 50
        error = math.sqrt(sum((one - mean) ** 2 for one in behind) / 49) / math.sqrt(50)
        assert choice.candidates[kind] == pytest.approx(
            {"nll": own.mean(), "behind": mean, "error": error}, abs=1e-9
        )


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=2, max_size=80),
    kind=st.sampled_from(["temperature", "line"]),
)
def test_each_image_is_left_out_once_and_classes_are_spread(labels: list[int], kind: str) -> None:
    targets = np.array(labels)
    raw = np.random.default_rng(0).normal(size=(len(labels), 7))
    parts = list(cross_fitted(kind, raw, targets))
    assert len(parts) == min(5, len(labels))
    assert sorted(np.concatenate([rows for rows, _ in parts]).tolist()) == [*range(len(labels))]
    sizes = [len(rows) for rows, _ in parts]
    assert max(sizes) - min(sizes) <= 1
    for label, count in Counter(labels).items():
        own = [int((targets[rows] == label).sum()) for rows, _ in parts]
        assert max(own) - min(own) <= 1
        assert sum(own) == count
    for rows, calibration in parts:
        others = np.setdiff1d(np.arange(len(labels)), rows)
        assert calibration == fit_calibration(kind, raw[others], targets[others])


@pytest.mark.parametrize("kind", CALIBRATORS)
def test_held_out_losses_are_of_calibrations_that_have_not_seen_the_image(kind: str) -> None:
    raw, labels = bent(60)
    found = choose._held_out_losses(kind, raw, labels)
    for rows, _ in cross_fitted(kind, raw, labels):
        others = np.setdiff1d(np.arange(60), rows)
        own = fit_calibration(kind, raw[others], labels[others]).apply(raw[rows])[1]
        expected = [-math.log(row[label]) for row, label in zip(own, labels[rows], strict=True)]
        assert found[rows].tolist() == pytest.approx(expected)


def test_a_probability_of_0_is_a_large_loss_and_not_an_infinite_one() -> None:
    raw, labels = too_sharp(60)
    raw[0, labels[0]] = -1e6
    for kind in CALIBRATORS:
        assert np.isfinite(choose._held_out_losses(kind, raw, labels)).all()
    assert choose_calibration(raw, labels).calibration.calibrator in CALIBRATORS


def test_kinds_are_made_of_one_another() -> None:
    raw, labels = bent(400)
    temperature, line, isotonic, vector = (fit_calibration(k, raw, labels) for k in CALIBRATORS)
    assert temperature == Calibration(temperature.temperature)
    torch_logits, torch_labels = (torch.from_numpy(own) for own in (raw, labels))
    assert temperature.temperature == fit_temperature(torch_logits, torch_labels)
    assert line.temperature == isotonic.temperature == temperature.temperature
    assert line.top_label is not None and len(line.top_label.positions) == 1
    assert isotonic.top_label is not None and len(isotonic.top_label.positions) > 3
    assert vector.vector is not None and vector.top_label is None
    assert [own.calibrator for own in (temperature, line, isotonic, vector)] == [*CALIBRATORS]
    best = raw.argmax(axis=1)
    for own in (temperature, line, isotonic):
        assert own.apply(raw)[1].argmax(axis=1).tolist() == best.tolist()


def test_logits_are_scaled_before_the_temperature_and_mapped_behind_it() -> None:
    raw = np.array([[2.0, 1.0], [0.0, 3.0]])
    own = Calibration(2.0, VectorScaling((2.0, 1.0), (1.0, -1.0)))
    np.testing.assert_allclose(own.scale(raw), [[2.5, 0.0], [0.5, 1.0]])
    line = Calibration(2.0, None, TopLabelMap((0.0,), (0.3,), 0.5, 0.5))
    np.testing.assert_allclose(line.apply(raw)[0], raw / 2)
    confidence = [1 / (1 + math.exp(-(0.5 * odds + 0.3))) for odds in (0.5, 1.5)]
    np.testing.assert_allclose(line.apply(raw)[1].max(axis=1), confidence)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_precision_of_logits_hardly_matters(dtype: type) -> None:
    raw, labels = bent(300)
    for kind in CALIBRATORS:
        own, wide = (fit_calibration(kind, part, labels) for part in (raw.astype(dtype), raw))
        np.testing.assert_allclose(own.apply(raw)[1], wide.apply(raw)[1], atol=1e-3)


@pytest.mark.parametrize("kind", CALIBRATORS)
def test_it_comes_back_from_json_to_the_bit(kind: str) -> None:
    own = fit_calibration(kind, *bent(200))
    assert Calibration.from_dict(json.loads(json.dumps(own.to_dict()))) == own


LINE = {"positions": [0.0], "values": [0.1], "below": 0.5, "above": 0.5}
PLAIN = {"kind": "temperature", "temperature": 1.5, "vector": None, "top_label": None}


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {**PLAIN, "temperature": 0},
        {**PLAIN, "temperature": -1},
        {**PLAIN, "temperature": math.nan},
        {**PLAIN, "temperature": math.inf},
        {**PLAIN, "temperature": None},
        {**PLAIN, "kind": "vector", "vector": {"scales": [1.0, 1.0], "biases": [0.0]}},
        {**PLAIN, "kind": "vector", "vector": {"scales": [0.0], "biases": [0.0]}},
        {**PLAIN, "kind": "vector", "vector": {"scales": [1.0]}},
        {**PLAIN, "kind": "vector", "vector": [1.0]},
        {**PLAIN, "kind": "line", "top_label": {**LINE, "below": -1}},
        {**PLAIN, "kind": "line", "top_label": {}},
        {k: v for k, v in PLAIN.items() if k != "vector"},
    ],
)
def test_what_is_no_calibration_is_refused(wrong: dict[str, Any]) -> None:
    assert Calibration.from_dict(PLAIN) == Calibration(1.5)
    assert Calibration.from_dict({**PLAIN, "kind": "line", "top_label": LINE}).top_label
    with pytest.raises((TypeError, KeyError, ValueError)):
        Calibration.from_dict(wrong)


def test_a_run_with_an_unknown_calibrator_is_refused() -> None:
    mixture = {"inside": [0.0, 1.0], "outside": [0.0, 1.0]}
    values = {"pairs": [], "mixture": mixture, "strength": 1, "zero_shot_temperature": 0.9}
    values["outside"] = {"scale": 1.0, "offset": 0.0}
    assert Fitted.from_dict({**values, "calibration": PLAIN}, 1).calibration == Calibration(1.5)
    with pytest.raises(ValueError, match="unknown kind 'platt'"):
        Fitted.from_dict({**values, "calibration": {**PLAIN, "kind": "platt"}}, 1)


def test_with_wrong_labels_a_temperature_is_fitted_for_right_ones_in_every_fold() -> None:
    random = np.random.default_rng(0)
    logits = 4 * random.normal(size=(600, 8))
    chances = softmax(logits)
    labels = (chances.cumsum(axis=1) < random.random((600, 1))).sum(axis=1).clip(max=7)
    wrong = random.random(600) < 0.2
    noisy = np.where(wrong, (labels + random.integers(1, 8, 600)) % 8, labels)
    trusting = fit_calibration("line", logits, noisy)
    assert trusting.temperature > 1.3
    own = fit_calibration("line", logits, noisy, 0.2)
    assert (own.calibrator, own.top_label, own.label_noise) == ("temperature", None, 0.2)
    assert own.temperature == pytest.approx(1, abs=0.2)
    for _, fold in cross_fitted("temperature", logits, noisy, 0.2):
        assert fold.temperature == pytest.approx(own.temperature, abs=0.15)
    assert Calibration.from_dict(own.to_dict()) == own


def test_a_calibrator_that_needs_all_classes_is_no_candidate_without_them() -> None:
    assert candidates(None, all_classes=True) == [*CALIBRATORS]
    assert candidates(None, all_classes=False) == ["temperature", "line", "isotonic"]
    assert candidates("vector", all_classes=True) == ["vector"]


def test_fewer_images_than_classes_leave_out_what_needs_all_classes() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (80, 90))
    labels = picked(random, chances(logits))
    assert {*choose_calibration(logits, labels).candidates} == {"temperature", "line", "isotonic"}
    enough = choose_calibration(logits[:, :80], np.minimum(labels, 79))
    assert "vector" in enough.candidates
