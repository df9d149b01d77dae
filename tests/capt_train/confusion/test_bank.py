"""The bank and both miners against METHOD 2 to 4 written out again, sample by sample."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from capt_train.confusion.bank import (
    ConfusionBank,
    intensity,
    mined_classes,
    mined_pairs,
    retrieve,
    semantic_scores,
)
from tests.banks import count_matrix

DIM = 4


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_labels(samples: int, classes: int, seed: int = 7) -> Tensor:
    return torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed))


def some_bank(samples: int = 30, classes: int = 5, seed: int = 0) -> ConfusionBank:
    embeddings = functional.normalize(random(samples, DIM, seed=seed + 1), dim=1)
    logits = random(samples, classes, seed=seed, scale=2)
    return ConfusionBank.fill(logits, some_labels(samples, classes, seed), embeddings)


def bank_of(
    labels: list[int], predicted: list[int], embeddings: list[list[float]]
) -> ConfusionBank:
    """Return a bank of three classes in which each sample is called what is asked for."""
    logits = 5.0 * functional.one_hot(torch.tensor(predicted), 3)
    return ConfusionBank.fill(logits, torch.tensor(labels), torch.tensor(embeddings))


def right_bank() -> ConfusionBank:
    labels = torch.tensor([0, 1, 2])
    return ConfusionBank.fill(9.0 * torch.eye(3), labels, torch.eye(3, DIM))


banks = st.builds(
    some_bank, st.integers(1, 40), st.integers(2, 6), st.integers(min_value=0, max_value=10**6)
)


def probabilities(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def counts_by_hand(labels: list[int], logits: list[list[float]], classes: int) -> list[list[float]]:
    counts = [[0.0] * classes for _ in range(classes)]
    for label, row in zip(labels, logits, strict=True):
        if (predicted := row.index(max(row))) != label:
            counts[label][predicted] += 1
    return counts


def scores_by_hand(bank: ConfusionBank, predicted: int, confidences: list[float]) -> list[float]:
    behind = [row[predicted] for row in count_matrix(bank).tolist()]
    total = sum(behind)
    return [
        -math.inf if i == predicted else (1 + (n / total if total else 0)) * confidence
        for i, (n, confidence) in enumerate(zip(behind, confidences, strict=True))
    ]


def mined_by_hand(bank: ConfusionBank, k: int) -> list[list[int]]:
    rows = []
    scores = semantic_scores(bank, bank.predicted, bank.confidences).tolist()
    for predicted, row in zip(bank.predicted.tolist(), scores, strict=True):
        others = [i for i in range(len(row)) if i != predicted]
        rows.append([predicted, *sorted(others, key=lambda i: (-row[i], i))[:k]])
    return rows


def retrieved_by_hand(bank: ConfusionBank, row: int, mined: list[int]) -> list[int]:
    found = []
    for wanted in mined:
        candidates = [
            j
            for j, (label, predicted) in enumerate(
                zip(bank.labels.tolist(), bank.predicted.tolist(), strict=True)
            )
            if label == wanted and predicted != label and j != row
        ]
        behind_cell = [j for j in candidates if bank.predicted[j] == mined[0]]
        query = bank.embeddings[row]
        found.append(
            max(
                behind_cell or candidates,
                key=lambda j: float(query @ bank.embeddings[j]),
                default=-1,
            )
        )
    return found


# the bank itself


@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (12, 3), (60, 7)])
def test_fill_counts_errors_and_keeps_what_the_model_said(samples: int, classes: int) -> None:
    logits, labels = random(samples, classes, scale=3), some_labels(samples, classes)
    embeddings = functional.normalize(random(samples, DIM), dim=1)
    bank = ConfusionBank.fill(logits, labels, embeddings)
    assert count_matrix(bank).tolist() == counts_by_hand(labels.tolist(), logits.tolist(), classes)
    assert bank.predicted.tolist() == [row.index(max(row)) for row in logits.tolist()]
    for own, row in zip(bank.confidences.tolist(), logits.tolist(), strict=True):
        assert own == pytest.approx(probabilities(row), abs=1e-6)
    assert torch.equal(bank.labels, labels)
    assert torch.equal(bank.embeddings, embeddings)


def test_half_precision_logits_that_require_gradients_give_a_plain_float32_bank() -> None:
    logits = random(4, 3).half().requires_grad_()
    bank = ConfusionBank.fill(logits, some_labels(4, 3), random(4, DIM))
    assert bank.confidences.dtype == bank.counts.dtype == torch.float32
    assert not bank.confidences.requires_grad


@pytest.mark.parametrize("momentum", [0.0, 0.75, 0.9, 1.0])
def test_a_write_back_blends_counts_and_confidences(momentum: float) -> None:
    bank, logits = some_bank(20, 4), random(20, 4, seed=5, scale=2)
    after = bank.updated(logits, momentum)
    new = counts_by_hand(bank.labels.tolist(), logits.tolist(), 4)
    for a in range(4):
        for b in range(4):
            expected = momentum * float(count_matrix(bank)[a, b]) + (1 - momentum) * new[a][b]
            assert float(count_matrix(after)[a, b]) == pytest.approx(expected, abs=1e-5)
    for sample in range(20):
        seen = probabilities(logits[sample].tolist())
        old = bank.confidences[sample].tolist()
        blend = [momentum * old[c] + (1 - momentum) * seen[c] for c in range(4)]
        assert after.confidences[sample].tolist() == pytest.approx(blend, abs=1e-6)
        assert int(after.predicted[sample]) == blend.index(max(blend))
    assert torch.equal(after.labels, bank.labels)
    assert torch.equal(after.embeddings, bank.embeddings)


def test_nine_tenths_of_the_old_bank_stay_by_default() -> None:
    bank, logits = some_bank(), random(30, 5, seed=3)
    assert torch.equal(count_matrix(bank.updated(logits)), count_matrix(bank.updated(logits, 0.9)))


def test_a_write_back_leaves_the_old_bank_as_it_was() -> None:
    bank = some_bank()
    before = {name: tensor.clone() for name, tensor in vars(bank).items()}
    assert not torch.equal(count_matrix(bank.updated(random(30, 5, seed=3))), count_matrix(bank))
    assert all(torch.equal(getattr(bank, name), tensor) for name, tensor in before.items())


def test_the_bank_does_not_run_dry_when_every_later_prediction_is_right() -> None:
    first = bank = some_bank(40, 4)
    right = 9.0 * functional.one_hot(bank.labels, 4)
    for _ in range(60):
        bank = bank.updated(right)
    assert bank.confusions().keys() == first.confusions().keys()
    predicted, confidences = first.predicted, first.confidences
    torch.testing.assert_close(
        semantic_scores(bank, predicted, confidences),
        semantic_scores(first, predicted, confidences),
    )


@given(banks)
@settings(max_examples=30, deadline=None)
def test_cells_are_the_samples_that_are_called_something_else(bank: ConfusionBank) -> None:
    expected: Counter[tuple[int, int]] = Counter()
    for a, b in zip(bank.labels.tolist(), bank.predicted.tolist(), strict=True):
        expected[a, b] += a != b
    assert bank.confusions() == dict(sorted((+expected).items()))
    assert list(bank.confusions()) == sorted(bank.confusions())


def test_without_confusion_there_are_no_pairs() -> None:
    bank = right_bank()
    assert bank.confusions() == {}
    assert not len(bank.counts)


# SEM


@given(banks, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_semantic_scores_equal_their_equation(bank: ConfusionBank, seed: int) -> None:
    classes = bank.confidences.shape[1]
    predicted, confidences = some_labels(6, classes, seed), random(6, classes, seed=seed).softmax(1)
    scores = semantic_scores(bank, predicted, confidences).tolist()
    for own, p, row in zip(scores, predicted.tolist(), confidences.tolist(), strict=True):
        assert own == pytest.approx(scores_by_hand(bank, p, row), rel=1e-5)


def test_an_empty_column_leaves_the_confidences_as_they_are() -> None:
    confidences = torch.tensor([[0.2, 0.3, 0.5]])
    scores = semantic_scores(right_bank(), torch.tensor([2]), confidences)
    assert scores.tolist() == [[*confidences[0, :2].tolist(), -math.inf]]


def test_a_class_that_is_often_behind_the_prediction_overtakes_a_slightly_likelier_one() -> None:
    bank = bank_of([0, 0, 1, 2], [2, 2, 2, 2], [[1.0, 0.0]] * 4)  # N[0,2] = 2, N[1,2] = 1
    scores = semantic_scores(bank, torch.tensor([2]), torch.tensor([[0.25, 0.30, 0.45]]))
    assert scores[0].tolist() == pytest.approx([0.25 * 5 / 3, 0.30 * 4 / 3, -math.inf])


@given(banks, st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_mined_classes_are_the_pseudo_label_and_the_best_others(
    bank: ConfusionBank, k: int
) -> None:
    mined = mined_classes(bank, k)
    assert mined.shape == (len(bank.labels), 1 + min(k, bank.confidences.shape[1] - 1))
    assert mined.tolist() == mined_by_hand(bank, k)


@pytest.mark.parametrize("classes", [3, 40, 300])
def test_among_equal_scores_the_first_class_is_mined(classes: int) -> None:
    bank = ConfusionBank.fill(
        torch.zeros(5, classes), torch.zeros(5, dtype=torch.long), random(5, DIM)
    )
    assert mined_classes(bank, 2).tolist() == [[0, 1, 2]] * 5


@given(banks, st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_pairs_are_counted_without_order_most_frequent_first(bank: ConfusionBank, k: int) -> None:
    counter: Counter[tuple[int, int]] = Counter()
    for p, *others in mined_by_hand(bank, k):
        counter.update((min(p, i), max(p, i)) for i in others)
    expected = sorted(counter, key=lambda pair: (-counter[pair], pair))
    assert mined_pairs(bank, k) == expected


# SAM


@given(banks, st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_retrieval_equals_a_search_over_all_samples(bank: ConfusionBank, k: int) -> None:
    mined = mined_classes(bank, k)
    rows = torch.arange(len(bank.labels)).flip(0)
    found = retrieve(bank, rows, mined[rows])
    for row, own in zip(rows.tolist(), found.tolist(), strict=True):
        assert own == retrieved_by_hand(bank, row, mined[row].tolist())
        for wanted, sample in zip(mined[row].tolist(), own, strict=True):
            assert sample != row
            if sample >= 0:
                assert bank.labels[sample] == wanted
                assert bank.predicted[sample] != wanted


def test_more_queries_than_fit_at_once_get_the_same_answers() -> None:
    bank = some_bank(700, 5)
    mined, rows = mined_classes(bank, 2), torch.arange(700)
    assert mined.tolist() == mined_by_hand(bank, 2)
    whole = retrieve(bank, rows, mined)
    parts = [retrieve(bank, part, mined[part]) for part in (rows[:255], rows[255:600], rows[600:])]
    assert torch.equal(whole, torch.cat(parts))


def test_samples_of_the_same_confusion_come_before_more_similar_ones() -> None:
    bank = bank_of(
        labels=[0, 1, 1, 1],
        predicted=[0, 2, 0, 1],  # row 1 is nearest, row 2 has the cell N[1,0], row 3 is right
        embeddings=[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]],
    )
    query = torch.tensor([0])
    assert retrieve(bank, query, torch.tensor([[0, 1, 2]])).tolist() == [[-1, 2, -1]]
    assert retrieve(bank, query, torch.tensor([[2, 1, 0]])).tolist() == [[-1, 1, -1]]


def test_a_query_that_is_confused_itself_gets_another_of_its_kind_or_none() -> None:
    lonely = bank_of([0, 1], [1, 1], [[1.0, 0.0], [0.0, 1.0]])
    query, mined = torch.tensor([0]), torch.tensor([[1, 0]])
    assert retrieve(lonely, query, mined).tolist() == [[-1, -1]]
    elsewhere = bank_of([0, 0, 0], [1, 2, 2], [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert retrieve(elsewhere, query, mined).tolist() == [[-1, 2]]


def test_nothing_is_retrieved_without_confusion_or_without_queries() -> None:
    bank = right_bank()
    found = retrieve(bank, torch.tensor([0, 2]), torch.tensor([[0, 1], [2, 0]]))
    assert found.tolist() == [[-1, -1], [-1, -1]]
    none = retrieve(
        some_bank(), torch.zeros(0, dtype=torch.long), mined_classes(some_bank(), 2)[:0]
    )
    assert none.shape == (0, 3)


@given(st.lists(st.lists(st.floats(-30, 30), min_size=4, max_size=4), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_intensity_is_one_minus_the_lead_of_the_first_class(rows: list[list[float]]) -> None:
    found = intensity(torch.tensor(rows)).tolist()
    for own, row in zip(found, rows, strict=True):
        first, second = sorted(probabilities(row), reverse=True)[:2]
        assert own == pytest.approx(1 - (first - second), abs=1e-5)
        assert 0 <= own <= 1


# files and devices


def test_a_bank_comes_back_bit_by_bit(tmp_path: Path) -> None:
    bank = some_bank().updated(random(30, 5, seed=4))
    bank.save(tmp_path / "bank.safetensors")
    loaded = load_file(tmp_path / "bank.safetensors")
    assert loaded.keys() == vars(bank).keys()
    for name, tensor in vars(bank).items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]


def test_moving_a_bank_moves_every_tensor() -> None:
    moved = some_bank().to(torch.device("meta"))
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}


def test_without_momentum_no_old_cell_is_left() -> None:
    logits = random(30, 5, seed=4)
    after = some_bank().updated(logits, 0.0)
    assert (after.counts > 0).all()
    fresh = ConfusionBank.fill(logits, after.labels, after.embeddings)
    assert torch.equal(after.cells, fresh.cells)
