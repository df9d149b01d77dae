from dataclasses import asdict, replace

import numpy as np
import pytest

from capt_deploy.backends.base import Outputs
from capt_deploy.confidence.calibration import Calibration
from capt_deploy.metrics.calibration import accuracy, expected_calibration_error, softmax
from capt_deploy.verify.gate import LIMITS, GateResult, compare_outputs, gate_table

PERFECT = GateResult("fp16", 1000, 1000, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)


def answers(logits: np.ndarray, embedding: np.ndarray | None = None) -> Outputs:
    own = np.eye(len(logits), dtype=np.float32) if embedding is None else embedding
    return Outputs(logits.astype(np.float32), softmax(logits).astype(np.float32), own)


def test_differences_are_the_ones_by_hand() -> None:
    expected = answers(np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]))
    turned = np.array([[1.0, 0, 0], [0, 0.6, 0.8], [0, 0, 1]], np.float32)
    found = answers(np.array([[2.5, 0.0], [1.0, 0.0], [3.0, 0.0]]), turned)
    result = compare_outputs("fp16", expected, found, np.array([0, 1, -1]))
    assert (result.images, result.labelled) == (3, 2)
    assert result.top1_agreement == pytest.approx(2 / 3)
    assert result.max_logit_difference == 1.0
    assert result.mean_logit_difference == pytest.approx(2.5 / 6)
    assert result.embedding_cosine == pytest.approx(0.6)
    assert result.accuracy_difference == -0.5  # of the two that have a label
    labels = np.array([0, 1])
    assert accuracy(softmax(found.logits[:2]), labels) == 0.5
    ece = [expected_calibration_error(softmax(of.logits[:2]), labels) for of in (found, expected)]
    assert result.ece_difference == pytest.approx(ece[0] - ece[1])
    nll = [-np.log(softmax(of.logits[:2])[[0, 1], labels]).mean() for of in (found, expected)]
    assert result.nll_difference == pytest.approx(nll[0] - nll[1])
    top = abs(1 / (1 + np.exp(-1.0)) - 1 / (1 + np.exp(1.0)))
    assert result.max_probability_difference == pytest.approx(top, abs=1e-6)


def test_the_jump_of_a_factor_with_the_class_is_no_difference_beside_that_of_the_class() -> None:
    calibration = Calibration(factors=(1.0, 0.8))
    expected = answers(calibration.weigh(np.array([[5.0, 4.99], [0.0, 3.0]], np.float32)))
    found = answers(calibration.weigh(np.array([[4.99, 5.0], [0.0, 3.1]], np.float32)))
    result = compare_outputs("fp16", expected, found, np.array([-1, -1]), calibration)
    assert result.top1_agreement == 0.5
    assert result.max_logit_difference == pytest.approx(0.08, abs=1e-4)  # 0.8 · 0.1
    assert result.max_probability_difference < 0.01
    assert compare_outputs("fp16", expected, found, np.array([-1, -1])).max_logit_difference > 0.9
    # without another class a wrong factor is one
    wrong = answers(found.logits * np.array([[1.0], [1.1]], np.float32))
    result = compare_outputs("fp16", expected, wrong, np.array([-1, -1]), calibration)
    assert result.max_logit_difference == pytest.approx(0.8 * (3.1 * 1.1 - 3), abs=1e-4)


def test_without_labels_accuracy_is_not_judged() -> None:
    same = answers(np.array([[2.0, 0.0]]))
    result = compare_outputs("fp32", same, same, np.array([-1]))
    assert (result.accuracy_difference, result.ece_difference, result.nll_difference) == (None,) * 3
    assert result.passed


@pytest.mark.parametrize("name", asdict(LIMITS["fp16"]))
def test_each_figure_has_its_limit_in_both_directions(name: str) -> None:
    limit = getattr(LIMITS["fp16"], name)
    least = name in ("top1_agreement", "embedding_cosine")
    assert PERFECT.passed
    assert replace(PERFECT, **{name: limit}).passed
    beyond = limit - 5e-3 if least else 1.01 * limit
    beyond = 0.01 if name.startswith(("accuracy", "ece")) else beyond
    wrong = replace(PERFECT, **{name: beyond})
    assert len(wrong.failures) == 1 and name.replace("_", " ") in wrong.failures[0]
    if name.startswith(("accuracy", "ece", "nll")):
        assert not replace(PERFECT, **{name: -beyond}).passed
    assert not replace(PERFECT, **{name: float("nan")}).passed


def test_among_few_images_one_may_tip_over_but_not_in_float32() -> None:
    one_of_ten = replace(PERFECT, images=10, top1_agreement=0.9, accuracy_difference=-0.1)
    assert one_of_ten.passed
    assert not replace(one_of_ten, top1_agreement=0.8).passed
    assert not replace(one_of_ten, precision="fp32").passed


@pytest.mark.parametrize(
    ("images", "precision", "tipped"), [(64, "bf16", 3), (1000, "fp16", 9), (100_000, "int8", 3089)]
)
def test_as_many_may_tip_over_as_chance_has_it_at_the_limit(
    images: int, precision: str, tipped: int
) -> None:
    random = np.random.default_rng(0)
    chances = random.binomial(images, 1 - LIMITS[precision].top1_agreement, 200_000)
    assert np.mean(chances <= tipped - 1) < 0.95 <= np.mean(chances <= tipped)
    result = replace(PERFECT, precision=precision, images=images)
    assert replace(result, top1_agreement=1 - tipped / images).passed
    assert not replace(result, top1_agreement=1 - (tipped + 1) / images).passed


def test_what_is_no_number_becomes_null_in_json() -> None:
    values = replace(PERFECT, max_logit_difference=float("nan")).to_dict()
    assert values["max_logit_difference"] is None
    assert values["passed"] is False
    assert values["limits"] == asdict(PERFECT.limits)


def test_the_table_shows_every_graph_with_its_limits() -> None:
    failed = replace(PERFECT, max_logit_difference=7.0)
    lines = gate_table({"fp16": PERFECT, "other": failed}).splitlines()
    assert "passed" in lines[2] and "FAILED" in lines[4]
    assert "7" in lines[4] and lines[3].split()[0] == "limit"
