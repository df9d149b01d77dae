"""Small data sets for reports."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from capt_deploy.confidence.calibration import Calibration
from capt_deploy.evaluation.evaluate import Evaluation, Scores


@pytest.fixture
def make_data() -> Callable[..., Evaluation]:
    """Return a function that makes predictions that are right more often after tuning."""

    def make(
        images: int = 60,
        names: tuple[str, ...] = ("cat", "dog", "cow", "hen"),
        tuned: tuple[bool, ...] | None = None,
        zero_shot: bool = True,
        strength: float = 2.5,
        **others: object,
    ) -> Evaluation:
        rng = np.random.default_rng(0)
        labels = np.arange(images) % len(names)
        right = np.eye(len(names))[labels]
        noise = rng.normal(0, 1, right.shape)
        before = rng.normal(0, 1, right.shape) + right
        logits = (noise + strength * right) / 0.8
        scores = Scores(labels, logits, before if zero_shot else None, Calibration(0.8))
        given = {
            "class_names": names,
            "tuned": tuned or (True,) * len(names),
            "pairs": [(0, 1)] if len(names) > 1 else [],
            "files": [Path(f"/photos/{index}.png") for index in range(images)],
            "scores": {"tuned": scores},
            "provenance": {"seed": 1, "versions": {"numpy": "2"}, "classes": [1, 2]},
        }
        return Evaluation(**{**given, **others})

    return make
