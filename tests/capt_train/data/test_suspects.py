"""The least probable labels come first."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from capt_deploy.core.errors import RunError
from capt_train.data.copies import Copy
from capt_train.data.suspects import Suspects, rank_labels

NAMES = ("otter", "beaver", "mink")


def ranked(count: int = 200) -> tuple[Suspects, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    probabilities = draw.dirichlet(np.ones(3), count)
    labels = draw.integers(0, 3, count)
    paths = [f"train/{row}.jpg" for row in range(count)]
    wrong = 1 - probabilities[np.arange(count), labels]
    photos = rank_labels(paths, ["train"] * count, labels, probabilities, wrong, NAMES)
    copy = Copy("a.jpg", "b.jpg", ("train", "val"), ("otter", "otter"), 0.999)
    return Suspects(photos, 0.1, (copy,)), probabilities, labels


def test_the_ranking_is_that_of_cleanlab() -> None:
    from cleanlab.rank import get_label_quality_scores

    suspects, probabilities, labels = ranked()
    quality = get_label_quality_scores(
        labels, probabilities, method="self_confidence", adjust_pred_probs=False
    )
    expected = [f"train/{row}.jpg" for row in np.argsort(quality, kind="stable")]
    assert [photo.path for photo in suspects.labels] == expected
    first = suspects.labels[0]
    row = int(first.path.removeprefix("train/").removesuffix(".jpg"))
    assert first.label == NAMES[labels[row]]
    assert first.likely == NAMES[probabilities[row].argmax()]
    assert first.p_label == probabilities[row, labels[row]]
    assert len(suspects.probably_wrong) == (quality < 0.5).sum()
    assert suspects.to_dict()["copies"][0]["problem"] == "two splits"


def test_they_survive_their_file(tmp_path: Path) -> None:
    suspects, *_ = ranked(5)
    suspects.save(tmp_path / "suspects.json")
    assert Suspects.load(tmp_path / "suspects.json") == suspects


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", 2),
        ("labels", [{"path": "a.jpg"}]),
        ("labels", 5),
        ("copies", [{"first": "a"}]),
        ("wrong_share", "much"),
        ("path", "../../etc/passwd"),
        ("path", 5),
        ("p_wrong", math.nan),
        ("p_label", "x"),
    ],
)
def test_damaged_files_are_refused(key: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "suspects.json"
    ranked(2)[0].save(path)
    content = json.loads(path.read_text())
    (content["labels"][0] if key in content["labels"][0] else content)[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"not as capt-train writes it|the number NaN"):
        Suspects.load(path)
