"""Small data sets for reports."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from capt_deploy.report.data import Answers, ReportData


@pytest.fixture
def make_data() -> Callable[..., ReportData]:
    """Return a function that makes answers that are right more often after tuning."""

    def make(
        images: int = 60,
        names: tuple[str, ...] = ("cat", "dog", "cow", "hen"),
        tuned: tuple[bool, ...] | None = None,
        zero_shot: bool = True,
        strength: float = 2.5,
        **others: object,
    ) -> ReportData:
        rng = np.random.default_rng(0)
        labels = np.arange(images) % len(names)
        right = np.eye(len(names))[labels]
        noise = rng.normal(0, 1, right.shape)
        models = [Answers("tuned", (noise + strength * right) / 0.8, 0.8)]
        if zero_shot:
            before = rng.normal(0, 1, right.shape) + right
            models.insert(0, Answers("zero-shot", before, 1.0))
        given = {
            "title": "Some animals",
            "files": [Path(f"/photos/{index}.png") for index in range(images)],
            "labels": labels,
            "class_names": names,
            "tuned": tuned or (True,) * len(names),
            "models": models,
            "pairs": [(0, 1)] if len(names) > 1 else [],
            "provenance": {"seed": 1, "versions": {"numpy": "2"}, "classes": [1, 2]},
        }
        return ReportData(**{**given, **others})

    return make
