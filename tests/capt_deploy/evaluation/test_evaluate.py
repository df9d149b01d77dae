"""The report: whose columns count in which scope, what tuning repaired and what it broke."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capt_deploy.confidence.calibration import Calibration
from capt_deploy.core.errors import ConfigError
from capt_deploy.evaluation.evaluate import Scores, confused_pairs, evaluate, harmonic_mean
from capt_deploy.metrics.calibration import all_metrics, softmax

NAMES = ("ape", "bee", "cow", "dog", "elk")
TUNED = (True, False, True, True, False)  # not the first half: columns must not be taken by place
PAIRS = [(0, 2), (2, 3), (1, 4), (3, 0)]


def scores(seed: int = 0, n: int = 60) -> Scores:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(2, n, len(NAMES))) * 3
    return Scores(random.integers(0, len(NAMES), n), logits[0], logits[1])


def by_hand(given: Scores, logits: np.ndarray, own: list[int]) -> dict:
    rows = [i for i, label in enumerate(given.labels) if label in own]
    labels = [own.index(given.labels[i]) for i in rows]
    cut = np.array([[logits[i][column] for column in own] for i in rows])
    return all_metrics(softmax(cut), np.array(labels))


def top(row: np.ndarray, own: list[int]) -> int:
    return max(own, key=lambda column: row[column])


def confusion_by_hand(given: Scores, own: list[int], pairs: list) -> dict:
    errors = fixed = right = broken = 0
    for label, tuned, zero_shot in zip(given.labels, given.tuned, given.zero_shot, strict=True):
        if label not in own:
            continue
        before, after = top(zero_shot, own), top(tuned, own)
        if (label, before) in pairs:
            errors += 1
            fixed += after == label
        right += before == label
        broken += before == label and after != label
    return {
        "recovered": fixed / errors if errors else None,
        "broken": broken / right if right else None,
        "counts": {
            "zero_shot_errors_in_pairs": errors,
            "recovered": fixed,
            "zero_shot_right": right,
            "broken": broken,
        },
    }


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 80))
def test_the_whole_report_equals_its_definition(seed: int, n: int) -> None:
    given = scores(seed, n)
    report = evaluate(given, NAMES, TUNED, PAIRS)
    base, new = [0, 2, 3], [1, 4]
    for part, logits in ((report, given.tuned), (report["zero_shot"], given.zero_shot)):
        for scope, own in (("base", base), ("new", new), ("all", [0, 1, 2, 3, 4])):
            if np.isin(given.labels, own).any():
                assert part[scope] == pytest.approx(by_hand(given, logits, own))
            else:
                assert part[scope] is None
        if part["base"] and part["new"]:
            a, b = part["base"]["accuracy"], part["new"]["accuracy"]
            expected = 0 if a + b == 0 else 2 * a * b / (a + b)
            assert part["harmonic_mean"] == pytest.approx(expected)
        else:
            assert part["harmonic_mean"] is None
    confusion = dict(report["confusion"])
    del confusion["pairs"]
    assert confusion == confusion_by_hand(given, base, PAIRS)


def one_hot(columns: list[int], classes: int = 3) -> np.ndarray:
    return np.eye(classes)[columns] * 5


def test_recovery_and_breakage_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 2])
    before = [1, 1, 2, 0, 1, 2]  # two errors in the mined pair (0, 1), one outside it
    after = [0, 1, 0, 1, 1, 0]  # one recovered, one newly broken in the pair, one outside it
    given = Scores(labels, one_hot(after), one_hot(before))
    confusion = evaluate(given, NAMES[:3], [True] * 3, [(0, 1)])["confusion"]
    # right answers that are lost count wherever they go, not only into mined pairs
    assert (confusion["recovered"], confusion["broken"]) == (1 / 2, 2 / 3)
    assert confusion["counts"] == {
        "zero_shot_errors_in_pairs": 2,
        "recovered": 1,
        "zero_shot_right": 3,
        "broken": 2,
    }
    assert confusion["pairs"] == [
        {"true": "ape", "predicted": "bee", "zero_shot": 2, "tuned": 2},
        {"true": "ape", "predicted": "cow", "zero_shot": 1, "tuned": 0},
        {"true": "cow", "predicted": "ape", "zero_shot": 0, "tuned": 1},
    ]


@pytest.mark.parametrize("pairs", [[], [(1, 0)]])
def test_without_errors_in_mined_pairs_there_is_no_share(pairs: list) -> None:
    given = Scores(np.array([0, 1]), one_hot([0, 1]), one_hot([1, 1]))
    confusion = evaluate(given, NAMES[:3], [True] * 3, pairs)["confusion"]
    assert confusion["recovered"] is None
    assert confusion["counts"]["zero_shot_errors_in_pairs"] == 0


def test_uncalibrated_figures_are_those_of_temperature_1() -> None:
    cold = scores()
    warm = Scores(cold.labels, cold.tuned / 2.5, cold.zero_shot / 0.4, Calibration(2.5), 0.4)
    before = evaluate(warm, NAMES, TUNED, PAIRS)["uncalibrated"]
    wanted = evaluate(cold, NAMES, TUNED, PAIRS)
    for scope in ("base", "new", "all"):
        assert before[scope] == pytest.approx(wanted[scope])
        assert before["zero_shot"][scope] == pytest.approx(wanted["zero_shot"][scope])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_factors_are_those_of_the_most_probable_class_in_each_scope(seed: int) -> None:
    plain = scores(seed)
    factors = [1.0, 0.5, 1.0, 1.0, 1.4]
    given = replace(plain, calibration=Calibration(2.0, factors=tuple(factors)))
    report, without = (evaluate(own, NAMES, TUNED, PAIRS) for own in (given, plain))
    for scope, own in (("base", [0, 2, 3]), ("new", [1, 4]), ("all", [0, 1, 2, 3, 4])):
        scaled = np.array([[factors[top(row, own)] * z for z in row] for row in given.tuned])
        assert report[scope] == pytest.approx(by_hand(given, scaled, own))
        assert report["uncalibrated"][scope] == pytest.approx(by_hand(given, 2 * given.tuned, own))
    assert report["base"] == without["base"]
    assert report["confusion"] == without["confusion"]
    assert report["zero_shot"] == without["zero_shot"]


def test_a_run_tuned_on_all_classes_has_only_the_scope_all() -> None:
    report = evaluate(scores(), NAMES, [True] * 5, PAIRS)
    for part in (report, report["zero_shot"]):
        assert part["base"] is part["new"] is part["harmonic_mean"] is None
        assert part["all"]["n"] == 60


@pytest.mark.parametrize("scope", ["base", "new", "all"])
def test_one_scope_is_measured_alone(scope: str) -> None:
    full, part = (
        evaluate(scores(), NAMES, TUNED, PAIRS),
        evaluate(scores(), NAMES, TUNED, PAIRS, scope),
    )
    assert part[scope] == full[scope]
    assert [name for name in ("base", "new", "all") if part[name]] == [scope]
    assert part["harmonic_mean"] is None
    assert part["confusion"] == full["confusion"]


def test_a_scope_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="no images of 'new' classes"):
        evaluate(scores(), NAMES, [True] * 5, PAIRS, "new")
    only_base = Scores(np.array([0, 2]), np.zeros((2, 5)), np.zeros((2, 5)))
    with pytest.raises(ConfigError, match="no images of 'new' classes"):
        evaluate(only_base, NAMES, TUNED, PAIRS, "new")


def test_a_new_class_cannot_win_against_base_columns() -> None:
    logits = np.array([[3.0, 9.0, 0.0, 0.0, 0.0]])  # an ape; "bee" is loudest, but new
    report = evaluate(Scores(np.array([0]), logits, logits), NAMES, TUNED, [])
    assert report["base"]["accuracy"] == 1
    assert report["all"]["accuracy"] == 0


@pytest.mark.parametrize(
    ("base", "new", "expected"),
    [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.6, 0.3, 0.4), (0.8, 0.8, 0.8)],
)
def test_harmonic_mean(base: float, new: float, expected: float) -> None:
    assert harmonic_mean(base, new) == pytest.approx(expected)


def test_the_worst_pairs_come_first_and_only_so_many() -> None:
    labels = np.repeat([0, 1, 2, 3], [5, 4, 3, 2])
    before = np.array([1] * 5 + [2] * 4 + [2] * 3 + [3] * 2)
    after = np.array([0] * 5 + [3] * 4 + [3] * 3 + [3] * 2)
    pairs = confused_pairs(labels, before, after, NAMES)
    assert [(p["true"], p["predicted"], p["zero_shot"], p["tuned"]) for p in pairs] == [
        ("ape", "bee", 5, 0),
        ("bee", "cow", 4, 0),
        ("bee", "dog", 0, 4),
        ("cow", "dog", 0, 3),
    ]
    assert confused_pairs(labels, before, after, NAMES, most=2) == pairs[:2]
    assert confused_pairs(labels, labels, labels, NAMES) == []


def test_a_pair_that_only_tuning_confuses_counts_as_much() -> None:
    labels = np.array([0, 0, 3, 3, 3])
    (worst, *_) = confused_pairs(
        labels, np.array([1, 1, 3, 3, 3]), np.array([0, 0, 4, 4, 4]), NAMES
    )
    assert worst == {"true": "dog", "predicted": "elk", "zero_shot": 0, "tuned": 3}
