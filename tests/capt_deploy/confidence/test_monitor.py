"""What a monitor counts, from one thread and many, in how much memory, and what it says."""

import json
import math
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from capt_deploy.confidence.familiarity import FamiliarityTable
from capt_deploy.confidence.monitor import (
    ALARM,
    CONFIDENCE_EDGES,
    Drift,
    FamiliarityTest,
    Monitor,
    UsageBaseline,
    chance_limit,
    measure_drift,
    population_stability_index,
)

NAMES = ("cat", "dog", "owl")


def stream(seed: int, n: int, sharpness: float = 4.0, classes: int = 3) -> tuple:
    random = np.random.default_rng(seed)
    confidence = random.beta(sharpness, 0.8, n).astype(np.float32)
    predicted = random.integers(0, classes, n)
    return confidence, predicted, confidence < 0.5


def baseline(n: int = 2000) -> UsageBaseline:
    confidence, predicted, rejected = stream(0, n)
    counted = UsageBaseline.from_predictions(confidence, predicted, 3)
    return replace(counted, rejection_rate=float(rejected.mean()))


def confidence_counts(confidence: np.ndarray) -> tuple[int, ...]:
    monitor = Monitor(None, NAMES)
    monitor.observe(confidence, np.zeros(len(confidence), np.int64))
    return monitor.summary().confidence_counts


def test_bins_hold_their_lower_edge_and_the_last_one_both() -> None:
    confidence = np.array([0.0, 0.05, 0.1, 0.9, 0.9499, 0.95, 0.99, 1.0])
    got = dict(zip(CONFIDENCE_EDGES, confidence_counts(confidence), strict=False))
    assert {edge: count for edge, count in got.items() if count} == {
        0.0: 2,
        0.1: 1,
        0.9: 2,
        0.95: 1,
        0.99: 2,
    }
    random = np.random.default_rng(0).random(5000)
    np.testing.assert_array_equal(
        confidence_counts(random), np.histogram(random, CONFIDENCE_EDGES)[0]
    )


def test_images_of_the_same_world_are_steady_and_all_is_counted() -> None:
    monitor = Monitor(baseline(), NAMES)
    confidence, predicted, rejected = stream(1, 3000)
    for start in range(0, 3000, 7):
        part = slice(start, start + 7)
        monitor.observe(confidence[part], predicted[part], rejected[part])
    summary = monitor.summary()
    assert summary.images == sum(summary.confidence_counts) == 3000
    assert summary.class_counts == {
        name: int((predicted == index).sum()) for index, name in enumerate(NAMES)
    }
    assert summary.rejection_rate == pytest.approx(rejected.mean())
    assert summary.expected_rejection_rate == pytest.approx(0.03, abs=0.03)
    assert summary.confidence_psi is not None
    assert summary.class_psi is not None
    assert max(summary.confidence_psi, summary.class_psi) < 0.03
    assert summary.verdict == "steady"
    assert str(summary).startswith("steady (3000 images so far); confidence PSI 0.0")


def familiar(scores: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    return FamiliarityTable(calibration).p_value(scores)


def evidence_of(scores: np.ndarray, calibration: np.ndarray) -> list[float]:
    """Return R after each image: the jumper on p-values among all scores, written out again."""
    ties = np.random.default_rng(0).random(len(scores))
    capital, evidence, found = [1 / 3] * 3, 0.0, []
    places: list[int] = []  # number of calibration scores that are at most as high
    for score, tie in zip(scores, ties, strict=True):
        place = sum(c <= score for c in calibration)
        lower = place + sum(other < place for other in places)
        equal = sum(other == place for other in places)
        p = (lower + tie * (equal + 1)) / (len(calibration) + len(places) + 1)
        places.append(place)
        before = sum(capital)
        moved = [0.99 * part + 0.01 * before / 3 for part in capital]
        capital = [
            part * (1 + bet * (p - 0.5)) for part, bet in zip(moved, (-1, 0, 1), strict=True)
        ]
        evidence = (evidence + 1) * sum(capital) / before
        found.append(evidence)
    return found


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_the_evidence_is_that_of_the_equations(shift: float) -> None:
    draw = np.random.default_rng(1)
    calibration, scores = draw.normal(size=30), draw.normal(shift, size=120)
    test = FamiliarityTest(30)
    for start in range(0, 120, 7):
        test.observe(familiar(scores[start : start + 7], calibration))
    assert test.highest == pytest.approx(max(evidence_of(scores, calibration)))


def test_alarms_without_a_shift_are_rarer_than_promised_and_come_soon_after_one() -> None:
    alarms, waits = 0, []
    for seed in range(60):
        draw = np.random.default_rng(seed)
        test, calibration = FamiliarityTest(100), draw.normal(size=100)
        test.observe(familiar(draw.normal(size=1000), calibration))
        alarms += test.highest >= 1000  # the same images give a lower alarm than the real one
        shifted = FamiliarityTest(100)
        shifted.observe(familiar(draw.normal(size=100), calibration))
        for image in range(200):
            if shifted.highest >= ALARM:
                waits.append(image)
                break
            shifted.observe(familiar(draw.normal(-1.5, size=1), calibration))
    # 1000 images, one alarm in 1000 or fewer: at most 1 − 1/e of the streams, were it exact
    assert alarms <= 60 * 0.63
    assert len(waits) == 60
    assert np.median(waits) < 60


def test_photos_of_another_kind_are_shifted_until_a_reset() -> None:
    own = baseline(200)
    confidence, predicted, _ = stream(12, 150)
    monitor = Monitor(own, NAMES)
    monitor.observe(confidence, predicted, familiarity=np.full(150, 0.02))
    summary = monitor.summary()
    assert summary.verdict == "shifted"
    assert summary.evidence is not None and summary.evidence >= ALARM
    assert "evidence of another kind of photos" in str(summary)
    monitor.reset()
    assert monitor.summary().evidence is None


def test_the_index_is_that_of_the_counts() -> None:
    monitor = Monitor(
        UsageBaseline.from_predictions(np.full(4, 0.5), np.array([0, 0, 1, 1]), 2), ("a", "b")
    )
    monitor.observe(np.full(4, 0.5), np.array([0, 0, 0, 1]))
    summary = monitor.summary()
    assert summary.confidence_psi == 0
    assert summary.class_psi == pytest.approx(0.2 * np.log(0.7 / 0.5) - 0.2 * np.log(0.3 / 0.5))


def test_a_darker_world_is_shifted_and_reset_forgets_it() -> None:
    monitor = Monitor(baseline(), NAMES)
    monitor.observe(*stream(2, 400, sharpness=1.0))
    summary = monitor.summary()
    assert summary.verdict == "shifted"
    assert summary.rejection_rate is not None
    assert summary.expected_rejection_rate is not None
    assert summary.rejection_rate > 3 * summary.expected_rejection_rate
    monitor.reset()
    assert monitor.summary().images == 0
    assert monitor.summary().verdict == "too few images"
    monitor.observe(*stream(3, 3000))
    assert monitor.summary().verdict == "steady"


def test_one_class_for_all_is_shifted_though_confidences_are_as_ever() -> None:
    monitor = Monitor(baseline(), NAMES)
    confidence, predicted, _ = stream(4, 1000)
    monitor.observe(confidence, predicted * 0)
    summary = monitor.summary()
    assert summary.confidence is not None
    assert summary.confidence.verdict == "steady"
    assert summary.verdict == "shifted"


def test_few_images_are_not_called_steady_and_rarely_shifted() -> None:
    own, alarms, early = baseline(), 0, 0
    for seed in range(300):
        monitor = Monitor(own, NAMES)
        monitor.observe(*stream(seed + 10, 20))
        early += monitor.summary().verdict == "too few images"
        monitor.observe(*stream(seed + 1000, 500))
        alarms += monitor.summary().verdict != "steady"
    assert early >= 297
    assert alarms <= 3


def test_a_baseline_too_small_to_tell_a_shift_is_never_called_steady() -> None:
    monitor = Monitor(baseline(60), NAMES)
    monitor.observe(*stream(5, 5000))
    assert monitor.summary().verdict == "too few images"


def test_classes_added_later_are_counted_and_change_nothing_else() -> None:
    monitor, plain = Monitor(baseline(), NAMES), Monitor(baseline(), NAMES)
    confidence, predicted, _ = stream(6, 900)
    for each in (monitor, plain):
        each.observe(confidence, predicted)
    monitor.observe(confidence[:100], np.full(100, 4))
    summary = monitor.summary()
    assert summary.class_counts["class 3"] == 0
    assert summary.class_counts["class 4"] == 100
    assert summary.class_psi == plain.summary().class_psi
    monitor.extend((*NAMES, "fox", "newt"))
    assert monitor.summary().class_counts["newt"] == 100
    monitor.extend((*NAMES, "fox", "newt", "boar"))
    assert monitor.summary().class_counts["boar"] == 0
    monitor.observe(confidence[:1], np.array([5]))
    assert monitor.summary().class_counts["boar"] == 1


def test_only_added_classes_leave_the_classes_without_a_comparison() -> None:
    monitor = Monitor(baseline(), NAMES)
    monitor.observe(np.full(10, 0.9), np.full(10, 3))
    assert monitor.summary().class_psi is None
    assert json.loads(json.dumps(monitor.summary().to_dict()))["classes"] is None


def test_without_a_baseline_it_still_counts() -> None:
    monitor = Monitor(None, NAMES)
    confidence, predicted, _ = stream(7, 50)
    monitor.observe(confidence, predicted)
    summary = monitor.summary()
    assert summary.images == 50
    assert summary.verdict == "no reference"
    assert summary.confidence_psi is summary.class_psi is summary.rejection_rate is None
    assert str(summary) == "no reference (50 images so far)"


def test_a_summary_is_json() -> None:
    monitor = Monitor(baseline(), NAMES)
    monitor.observe(*stream(8, 100))
    again = json.loads(json.dumps(monitor.summary().to_dict(), allow_nan=False))
    assert again["images"] == 100
    assert again["class_counts"].keys() == set(NAMES)
    assert len(again["confidence_edges"]) == len(again["confidence_counts"]) + 1
    assert again["confidence"].keys() == {"psi", "chance"}


def test_threads_lose_no_image() -> None:
    monitor = Monitor(baseline(), NAMES)
    confidence, predicted, rejected = stream(9, 40)

    def hammer(index: int) -> None:
        for _ in range(300):
            monitor.observe(confidence, predicted + (index % 2) * 5, rejected)
            if index == 0:
                summary = monitor.summary()
                assert sum(summary.class_counts.values()) == summary.images

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(hammer, index) for index in range(8)]:
            done.result()
    summary = monitor.summary()
    assert summary.images == sum(summary.class_counts.values()) == 8 * 300 * 40
    assert summary.rejection_rate == pytest.approx(rejected.mean())


def test_memory_does_not_grow_with_the_images() -> None:
    monitor = Monitor(baseline(), NAMES)
    confidence, predicted, rejected = stream(10, 64)
    for _ in range(100):  # the first calls fill Python's and numpy's own caches
        monitor.observe(confidence, predicted, rejected)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(3000):
            monitor.observe(confidence, predicted, rejected)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 2000  # bytes, after 192,000 images


def test_bad_observations_are_refused_and_leave_no_trace() -> None:
    monitor = Monitor(baseline(), NAMES)
    good = np.array([0.5, 0.6])
    for confidence, predicted, rejected, familiarity in (
        (good, np.array([0]), None, None),
        (good, np.array([0, -1]), None, None),
        (np.array([0.5, np.nan]), np.array([0, 1]), None, None),
        (good, np.array([0, 1]), np.array([True]), None),
        (good, np.array([0, 1]), None, np.array([0.5])),
        (good, np.array([0, 1]), None, np.array([0.5, np.nan])),
        (good, np.array([0, 1]), None, np.array([0.5, 0.0])),
        (np.ones((1, 2)), np.ones((1, 2), np.int64), None, None),
    ):
        with pytest.raises(ValueError):
            monitor.observe(confidence, predicted, rejected, familiarity)
    assert monitor.summary().images == 0
    assert sum(monitor.summary().class_counts.values()) == 0
    monitor.observe(np.empty(0), np.empty(0, np.int64))
    assert monitor.summary().images == 0


@pytest.mark.parametrize("rate", [None, 0.25])
def test_a_baseline_survives_its_arrays(rate: float | None) -> None:
    confidence, predicted, _ = stream(11, 500)
    counted = UsageBaseline.from_predictions(confidence, predicted, 5)
    own = replace(counted, rejection_rate=rate)
    again = UsageBaseline.from_arrays(own.arrays())
    assert (again.images, again.rejection_rate) == (500, rate)
    np.testing.assert_array_equal(again.confidence_histogram, own.confidence_histogram)
    np.testing.assert_array_equal(again.class_shares, own.class_shares)
    assert own.class_shares[3:].tolist() == [0, 0]


def test_damaged_baselines_are_refused() -> None:
    good = baseline().arrays()
    for name, value in (
        ("confidence_histogram", np.full(5, 0.2)),
        ("class_shares", np.array([0.5, 0.6])),
        ("class_shares", np.array([1.5, -0.5])),
        ("images", np.array([0])),
        ("rejection_rate", np.array([1.5])),
        ("rejection_rate", np.array([np.nan])),
    ):
        with pytest.raises(ValueError):
            UsageBaseline.from_arrays(good | {name: value})
    with pytest.raises(ValueError, match="'images'"):
        UsageBaseline.from_arrays({name: good[name] for name in good if name != "images"})
    with pytest.raises(ValueError, match="2 classes"):
        UsageBaseline.from_predictions(np.array([0.5]), np.array([2]), 2)
    with pytest.raises(ValueError, match="came 0"):
        UsageBaseline.from_predictions(np.empty(0), np.empty(0, np.int64), 2)


def test_the_index_of_a_case_done_by_hand() -> None:
    # 3 and 1 images where halves are expected of 4: (3.5, 1.5) / 5 against (2.5, 2.5) / 5
    got = population_stability_index(np.array([3, 1]), np.array([0.5, 0.5]), 4)
    assert got == pytest.approx(0.2 * math.log(0.7 / 0.5) - 0.2 * math.log(0.3 / 0.5))


def test_the_index_of_many_images_is_the_papers_without_smoothing() -> None:
    shares, counts = np.array([0.2, 0.3, 0.5]), np.array([400_000, 300_000, 300_000])
    slow = sum((a - e) * math.log(a / e) for a, e in zip(counts / 1e6, shares, strict=True))
    assert population_stability_index(counts, shares, 10**6) == pytest.approx(slow, rel=1e-5)


def test_the_index_is_zero_without_a_change_and_finite_with_the_largest() -> None:
    shares = np.array([0.25, 0.75, 0.0])
    assert population_stability_index(np.array([10, 30, 0]), shares, 40) == 0
    worst = population_stability_index(np.array([0, 0, 10**6]), shares, 10**6)
    assert 20 < worst < 40


@pytest.mark.parametrize("freedom", [1, 2, 12, 99, 999])
def test_the_limit_is_near_the_quantile_of_chi_squared(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy is the oracle")
    limit = chance_limit(freedom + 1, 100, 400)
    assert limit == pytest.approx(stats.chi2.isf(0.001, freedom) / 80, rel=0.04)


@pytest.mark.parametrize("bins", [2, 13, 100])
@pytest.mark.parametrize("skewed", [False, True])
def test_chance_alone_is_rarely_taken_for_a_shift(bins: int, skewed: bool) -> None:
    random = np.random.default_rng(bins)
    truth = random.dirichlet(np.full(bins, 0.3)) if skewed else np.full(bins, 1 / bins)
    alarms = above_watch = 0
    for reference_images in (50, 1000):
        for images in (10, 100, 1000):
            for _ in range(200):
                shares = random.multinomial(reference_images, truth) / reference_images
                found = measure_drift(random.multinomial(images, truth), shares, reference_images)
                assert found is not None
                alarms += found.verdict != "steady"
                above_watch += found.psi > 0.1
    assert alarms <= 6  # of 1200, each with a chance of about 1 in 1000
    assert above_watch > 10 * alarms + 50, "the usual limits alone must be wrong for these"


def test_a_shift_is_found() -> None:
    shares = np.full(10, 0.1)
    moved = np.array([200, 200, 200, 200, 200, 0, 0, 0, 0, 0])
    found = measure_drift(moved, shares, 1000)
    assert found is not None
    assert found.verdict == "shifted"
    slightly = np.array([50, 50, 80, 80, 100, 100, 120, 120, 150, 150])
    found = measure_drift(slightly, shares, 1000)
    assert found is not None
    assert found.verdict == "watch"
    assert measure_drift(moved * 0, shares, 1000) is None


def test_the_usual_limits_hold_where_chance_is_small() -> None:
    for psi, verdict in ((0.1, "steady"), (0.11, "watch"), (0.25, "watch"), (0.26, "shifted")):
        assert Drift(psi, 0.01).verdict == verdict
    assert Drift(0.3, 0.4).verdict == "steady"
    assert str(Drift(0.3, 0.2)) == "PSI 0.30 (by chance below 0.20)"
