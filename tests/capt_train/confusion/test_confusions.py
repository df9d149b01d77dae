from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from capt_deploy.core.errors import RunError
from capt_train.confusion.bank import ConfusionBank
from capt_train.confusion.confusions import (
    CONFUSIONS,
    ConfusionCell,
    Confusions,
    read_confusions,
    write_confusions,
)
from tests.banks import count_matrix

NAMES = ("otter", "beaver", "größer")
LABELS = (0, 0, 0, 1, 1, 2)
BEFORE = (1, 1, 0, 0, 1, 2)  # otter → beaver twice, beaver → otter once
AFTER = (0, 1, 2, 0, 1, 2)  # once each, and otter → größer anew
SAMPLES = tuple(f"train/{number}.jpg" for number in range(6))


def bank(predicted: tuple[int, ...]) -> ConfusionBank:
    logits = 9.0 * functional.one_hot(torch.tensor(predicted), 3)
    return ConfusionBank.fill(logits, torch.tensor(LABELS), torch.eye(6))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_confusions(tmp_path / CONFUSIONS, NAMES, bank(BEFORE), bank(AFTER), SAMPLES)
    return tmp_path / CONFUSIONS


def test_what_two_banks_hold_is_read_again_worst_pair_first(path: Path) -> None:
    assert read_confusions(path) == Confusions(
        NAMES,
        (3, 2, 1),
        (
            ConfusionCell("otter", "beaver", 2.0, 1.0, ("train/0.jpg", "train/1.jpg")),
            ConfusionCell("otter", "größer", 0.0, 1.0, ("train/2.jpg",)),
            ConfusionCell("beaver", "otter", 1.0, 1.0, ("train/3.jpg",)),
        ),
    )


def test_the_file_has_a_schema_and_names_instead_of_positions(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content) == ["schema", "class_names", "shots", "pairs"]
    assert content["schema"] == 1
    assert content["pairs"][1] == {
        "true": "otter",
        "predicted": "größer",
        "before": 0,
        "after": 1,
        "samples": ["train/2.jpg"],
    }
    assert content == json.loads(json.dumps(read_confusions(path).to_dict()))


def test_matrices_are_the_counts_of_the_banks(path: Path) -> None:
    before, after = read_confusions(path).matrices()
    assert before.tolist() == count_matrix(bank(BEFORE)).tolist()
    assert after.tolist() == count_matrix(bank(AFTER)).tolist()


def test_of_many_classes_those_of_the_worst_pairs_are_kept(path: Path) -> None:
    confusions = read_confusions(path)
    assert confusions.among_worst(3) is confusions
    worst = confusions.among_worst(2)
    first = confusions.pairs[0]
    assert set(worst.class_names) == {first.true, first.predicted}
    assert worst.class_names == tuple(name for name in NAMES if name in worst.class_names)
    assert [
        shots
        for name, shots in zip(NAMES, confusions.shots, strict=True)
        if name in worst.class_names
    ] == [*worst.shots]
    assert {(pair.true, pair.predicted) for pair in worst.pairs} == {
        (pair.true, pair.predicted)
        for pair in confusions.pairs
        if {pair.true, pair.predicted} == {first.true, first.predicted}
    }
    assert worst.matrices().shape == (2, 2, 2)


def test_fractions_are_rounded_and_a_pair_that_has_become_nothing_is_left_out(
    tmp_path: Path,
) -> None:
    right = 9.0 * functional.one_hot(torch.tensor(LABELS), 3)
    faded = bank(BEFORE).updated(right, 0.9)
    write_confusions(tmp_path / "a.json", NAMES, bank(LABELS), faded, SAMPLES)
    rows = [
        (row.true, row.after, row.samples) for row in read_confusions(tmp_path / "a.json").pairs
    ]
    # no bank calls these samples wrong any more: the counts are memory
    assert rows == [("otter", 1.8, SAMPLES[:2]), ("beaver", 0.9, SAMPLES[3:4])]
    gone = bank(BEFORE).updated(right, 1e-6)
    assert gone.confusions()
    write_confusions(tmp_path / "b.json", NAMES, bank(LABELS), gone, SAMPLES)
    assert read_confusions(tmp_path / "b.json").pairs == ()


def test_no_confusion_at_all_is_a_file_without_pairs(tmp_path: Path) -> None:
    write_confusions(tmp_path / CONFUSIONS, NAMES, bank(LABELS), bank(LABELS), SAMPLES)
    read = read_confusions(tmp_path / CONFUSIONS)
    assert read.pairs == ()
    assert not read.matrices().any()


def test_as_many_paths_as_samples_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        write_confusions(tmp_path / CONFUSIONS, NAMES, bank(BEFORE), bank(AFTER), SAMPLES[:5])
    assert not list(tmp_path.iterdir())


def set_in_pair(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["pairs"][0].update({key: value})


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another schema": lambda content: content.update(schema=2),
    "no schema": lambda content: content.pop("schema"),
    "no names": lambda content: content.pop("class_names"),
    "names as one text": lambda content: content.update(class_names="abc"),
    "two equal names": lambda content: content.update(
        class_names=[*NAMES, "otter"], shots=[1, 1, 1, 1]
    ),
    "too few shots": lambda content: content["shots"].pop(),
    "pairs that are a number": lambda content: content.update(pairs=3),
    "a pair that is null": lambda content: content.update(pairs=[None]),
    "a class of its own": set_in_pair("predicted", "otter"),
    "an unknown class": set_in_pair("predicted", "seal"),
    "a class that is a list": set_in_pair("true", ["otter"]),
    "a negative count": set_in_pair("after", -1),
    "a count that is no number": set_in_pair("after", float("nan")),
    "an endless count": set_in_pair("after", float("inf")),
    "a count beyond all floats": set_in_pair("after", 10**400),
    "paths as one text": set_in_pair("samples", "train/0.jpg"),
    "no count": lambda content: content["pairs"][0].pop("after"),
}


def refusal(path: Path) -> str:
    with pytest.raises(RunError) as caught:
        read_confusions(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_says_what_cannot_be_is_refused(name: str, path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    DAMAGE[name](content)
    path.write_text(json.dumps(content), encoding="utf-8")
    said = refusal(path)
    assert "not as capt-train writes it" in said or "the number" in said


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "\xff"])
def test_a_file_that_is_cut_or_foreign_is_refused(text: str, path: Path) -> None:
    path.write_bytes(text.encode("latin-1"))
    refusal(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / CONFUSIONS)


def test_reading_needs_no_torch(path: Path) -> None:
    program = (
        "import sys; from pathlib import Path;"
        "from capt_train.confusion.confusions import read_confusions;"
        "print(len(read_confusions(Path(sys.argv[1])).pairs), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["3", "False"]
