"""Each sentence says what the figures call for."""

from types import SimpleNamespace

import numpy as np
import pytest

from capt_deploy.confidence.calibration import Calibration
from capt_deploy.evaluation.evaluate import Scores
from capt_deploy.report.advice import advice
from capt_deploy.report.results import find_results


def scores(confidence: float, accuracy: float, images: int = 400) -> Scores:
    """Return answers among two classes that say `confidence` and are right on `accuracy`."""
    labels = np.arange(images) % 2
    wrong = np.arange(images) < round((1 - accuracy) * images)
    best = np.where(wrong, 1 - labels, labels)
    logits = np.zeros((images, 2))
    logits[np.arange(images), best] = np.log(confidence / (1 - confidence))
    return Scores(labels, logits, None, Calibration(1.0))


def texts(make_data, confidence: float, accuracy: float) -> dict[str, str]:
    data = make_data(400, ("cat", "dog"), scores={"tuned": scores(confidence, accuracy)})
    return advice(find_results(data, "page"))


@pytest.mark.parametrize(
    ("confidence", "accuracy", "expected"),
    [
        (0.8, 0.8, "Nothing to do"),
        (0.9, 0.7, "Subtract about 20.0 points"),
        (0.7, 0.9, "Add about 20.0 points"),
    ],
)
def test_confidence_that_is_off_is_corrected(make_data, confidence, accuracy, expected):
    assert texts(make_data, confidence, accuracy)["confidence"].startswith(expected)


def test_confidence_that_is_right_on_average_alone_is_told():
    results = SimpleNamespace(
        main=SimpleNamespace(
            after={"all": None}, report={"all": {"ece_15": 0.1}}, chance={"all": (0.01, 0.02)}
        ),
        predictions=SimpleNamespace(main=np.array([[0.5, 0.5]] * 2), labels=np.array([0, 1])),
        promises=[],
        pairs=[],
    )
    assert advice(results)["confidence"].startswith("On average it is right")


def test_the_share_that_may_be_answered_is_told(make_data):
    assert "at least 80.0 % sure: 100.0 % of them" in texts(make_data, 0.8, 0.96)["risk"]
    assert "No confidence is high enough" in texts(make_data, 0.8, 0.0)["risk"]
    sure, unsure = scores(0.9, 1.0, 100), scores(0.6, 0.5, 300)
    both = Scores(
        np.concatenate([sure.labels, unsure.labels]),
        np.concatenate([sure.tuned, unsure.tuned]),
        None,
    )
    found = find_results(make_data(400, ("cat", "dog"), scores={"tuned": both}), "page")
    text = advice(found)["risk"]
    assert text.startswith("For 95 right answers of 100")
    assert "at least 90.0 % sure: 25.0 % of them" in text  # all photos of one confidence, or none


def test_the_worst_pair_gets_photos_and_nothing_is_said_without_mistakes(make_data):
    assert "more photos of" in texts(make_data, 0.8, 0.8)["confusions"]
    perfect = texts(make_data, 0.8, 1.0)
    assert perfect["confusions"] == perfect["promises"] == ""
