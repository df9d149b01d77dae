"""METHOD 7 written out again with loops; fits against a grid search over the weight."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import normalize

from capt_deploy.core.errors import ModelError, RunError
from capt_train.method import mixture as mixtures
from capt_train.method.mixture import (
    Mixture,
    component_logits,
    fit_inside,
    fit_outside,
    inside_loss,
    outside_loss,
    pseudo_class_names,
    weights,
)

Floats = NDArray[np.float64]
GRID = np.linspace(0.002, 0.998, 499)
SCALE = 20.0
WORDS = [f"word{letter}" for letter in "abcdefghijklmnopqrst"]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels_for(batch: int, classes: int) -> Tensor:
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(7))


def world(*noise: float, seed: int = 0, batch: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    """Features around six directions, their labels, and prompts that miss these by `noise`."""
    centres = normalize(random(6, 16, seed=seed), dim=1)
    labels = labels_for(batch, 6)
    features = normalize(centres[labels] + 0.3 * random(batch, 16, seed=seed + 1), dim=1)
    prompts = [
        centres + size * random(6, 16, seed=seed + 2 + index) for index, size in enumerate(noise)
    ]
    return features, labels, normalize(torch.stack(prompts), dim=2)


def fitted_inside(features: Tensor, labels: Tensor, embeddings: Tensor) -> tuple[float, ...]:
    return fit_inside(component_logits(features, embeddings, SCALE), labels)


def fitted_outside(features: Tensor, pseudo: Tensor, *d: float) -> tuple[float, ...]:
    return fit_outside(component_logits(features, pseudo, SCALE), *d)


def pseudo_world(seed: int) -> tuple[Tensor, Floats, Tensor]:
    """Features, logits, and pseudo-classes over which the learned prompt is less sure."""
    features, _, pseudo = world(0.5, 0.5, seed=seed, batch=30)
    pseudo[1] = normalize(pseudo[1] + 0.4 * random(16, seed=99), dim=1)
    return features, logits_by_hand(features, pseudo, SCALE), pseudo


def probabilities(row: Floats) -> Floats:
    powers = np.array([math.exp(value - max(row)) for value in row])
    return powers / powers.sum()


def entropy(row: Floats) -> float:
    return -sum(value * math.log(value) for value in probabilities(row) if value > 0)


def inside_by_hand(shares: list[float], logits: Floats, labels: list[int]) -> float:
    total = 0.0
    for sample, own in zip(logits, labels, strict=True):
        mixed = (1 - sum(shares) / len(shares)) * sample[0]
        for share, learned in zip(shares, sample[1:], strict=True):
            mixed = mixed + share / len(shares) * learned
        total -= math.log(probabilities(mixed)[own])
    return total / len(labels)


def outside_by_hand(shares: list[float], logits: Floats, d: float) -> float:
    total = 0.0
    for index, share in enumerate(shares, start=1):
        for sample in logits:
            hand_written = entropy((1 - share) * sample[0])
            total += max(0.0, hand_written - entropy(share * sample[index]) + d)
    return total / len(logits)


def logits_by_hand(features: Tensor, embeddings: Tensor, scale: float) -> Floats:
    rows = [[scale * f @ prompt.T for prompt in embeddings.numpy()] for f in features.numpy()]
    return np.array(rows, dtype=np.float64)


# --- objectives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [[0.3], [0.9, 0.2], [0.1, 0.5, 0.7]])
def test_inside_loss_is_the_cross_entropy_of_the_mixed_logits(shares: list[float]) -> None:
    logits, labels = 3 * random(7, len(shares) + 1, 4), labels_for(7, 4)
    expected = inside_by_hand(shares, logits.numpy(), labels.tolist())
    value = inside_loss(torch.tensor(shares, dtype=torch.float64), logits, labels)
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("d", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shares", [[0.97], [0.9, 0.8], [0.6, 0.95, 0.7]])
def test_outside_loss_is_the_hinge_on_entropies(shares: list[float], d: float) -> None:
    logits = 3 * random(9, len(shares) + 1, 5)
    expected = outside_by_hand(shares, logits.numpy(), d)
    assert expected > 0
    value = outside_loss(torch.tensor(shares, dtype=torch.float64), logits, d)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_the_gap_of_the_hinge_is_a_tenth_unless_said() -> None:
    shares, logits = torch.tensor([1.0]), torch.ones(3, 2, 4)
    assert outside_loss(shares, logits).item() == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("learned", [1, 3])
def test_gradients_are_right(learned: int) -> None:
    logits, labels = 2 * random(6, learned + 1, 4), labels_for(6, 4)
    raw = random(learned, seed=3).requires_grad_()
    assert gradcheck(lambda a, z: inside_loss(a.sigmoid(), z, labels), (raw, logits))
    assert gradcheck(lambda a, z: outside_loss(a.sigmoid(), z), (raw, logits))
    assert torch.autograd.grad(outside_loss(raw.sigmoid(), logits), raw)[0].abs().min() > 0


@pytest.mark.parametrize("shares", [[0.5], [1.0, 0.0], [0.2, 0.4, 0.9], [1.0] * 49])
def test_weights_are_equal_parts_of_the_shares_and_what_is_left(shares: list[float]) -> None:
    own = weights(torch.tensor(shares, dtype=torch.float64)).tolist()
    learned = [share / len(shares) for share in shares]
    assert own == pytest.approx([1 - sum(learned), *learned], abs=1e-12)
    assert min(own) >= 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_float32_terms(dtype: torch.dtype) -> None:
    logits, labels = (20 * random(40, 2, 30)).to(dtype), labels_for(40, 30)
    for half, wide in (
        (
            inside_loss(torch.tensor([0.7]), logits, labels),
            inside_loss(torch.tensor([0.7]), logits.float(), labels),
        ),
        (
            outside_loss(torch.tensor([0.7]), logits),
            outside_loss(torch.tensor([0.7]), logits.float()),
        ),
    ):
        assert half.dtype == torch.float32
        assert torch.equal(half, wide)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_shares_still_give_float32_terms(dtype: torch.dtype) -> None:
    logits, labels = (20 * random(40, 2, 30)).to(dtype), labels_for(40, 30)
    share = torch.tensor([0.75], dtype=dtype)
    assert torch.equal(
        inside_loss(share, logits, labels), inside_loss(share.float(), logits, labels)
    )
    assert torch.equal(outside_loss(share, logits), outside_loss(share.float(), logits))


# --- fits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_weight_on_a_fine_grid_is_better_inside(seed: int) -> None:
    features, labels, embeddings = world(0.35, 0.3, seed=10 * seed)
    logits = logits_by_hand(features, embeddings, SCALE)
    costs = [inside_by_hand([float(pi)], logits, labels.tolist()) for pi in GRID[::4]]
    best = float(GRID[::4][int(np.argmin(costs))])
    assert 0.1 < best < 0.9  # so there is something to find
    rest, fitted = fitted_inside(features, labels, embeddings)
    assert fitted == pytest.approx(best, abs=0.006)
    assert rest + fitted == pytest.approx(1, abs=1e-12)
    assert inside_by_hand([fitted], logits, labels.tolist()) <= min(costs) + 1e-6


@pytest.mark.parametrize(("seed", "d"), [(0, 0.1), (10, 0.1), (20, 0.1), (30, 0.1), (0, 0.02)])
def test_outside_the_share_rests_at_the_largest_without_loss(
    seed: int, d: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, logits, pseudo = pseudo_world(seed)
    costs = [outside_by_hand([float(pi)], logits, d) for pi in GRID[::4]]
    largest = max(float(pi) for pi, cost in zip(GRID[::4], costs, strict=True) if cost == 0)
    assert 0.1 < largest < 0.85  # so there is something to find
    monkeypatch.setattr(mixtures, "_START", 0.9)
    _, fitted = fitted_outside(features, pseudo, d)
    assert fitted == pytest.approx(largest, abs=0.02)
    assert outside_by_hand([fitted], logits, d) < 1e-3


@pytest.mark.parametrize("seed", [0, 10])
def test_outside_a_gap_out_of_reach_is_followed_to_where_little_is_left_to_gain(seed: int) -> None:
    features, logits, pseudo = pseudo_world(seed)
    least = outside_by_hand([0.0], logits, 0.7)
    assert least > 0.001
    _, fitted = fitted_outside(features, pseudo, 0.7)
    assert fitted < 0.06
    assert least < outside_by_hand([fitted], logits, 0.7) < least + 2e-3


def test_the_better_prompt_gets_the_weight_inside() -> None:
    for noise, low, high in (((0.6, 0.02), 0.9, 1.0), ((0.02, 0.6), 0.0, 0.2)):
        features, labels, embeddings = world(*noise)
        assert low <= fitted_inside(features, labels, embeddings)[1] <= high


def overconfident(factor: float) -> tuple[Tensor, Tensor]:
    """Pseudo-classes over which the learned prompt is `factor` times as sharp as the other."""
    features = normalize(random(40, 8), dim=1)
    hand_written = 0.3 * normalize(random(10, 8, seed=1), dim=1)
    return features, torch.stack([hand_written, factor * hand_written])


def test_an_overconfident_prompt_loses_its_weight_outside_and_another_keeps_it() -> None:
    features, pseudo = overconfident(10)
    assert fitted_outside(features, pseudo)[1] < 0.1
    features, pseudo = overconfident(1)
    assert fitted_outside(features, pseudo, 0.0) == pytest.approx((0.5, 0.5), abs=0.02)


@pytest.mark.parametrize("d", [0.0, 0.1])
def test_a_component_that_equals_the_hand_written_prompt_loses_d_at_equal_shares(d: float) -> None:
    """Were its entropy compared with that of unscaled logits, it would have another loss."""
    logits = 5 * random(20, 1, 6).expand(-1, 3, -1)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert outside_loss(half, logits, d).item() == pytest.approx(2 * d, abs=1e-12)
    _, share = fit_outside(logits[:, :2], d)
    gaps = [entropy(share * z) - entropy((1 - share) * z) for z in logits[:, 0].numpy()]
    assert min(gaps) == pytest.approx(d, abs=0.06)  # less sure by d where the fit rests


def test_a_wider_gap_asks_for_a_smaller_weight_outside() -> None:
    features, pseudo = overconfident(4)
    fits = [fitted_outside(features, pseudo, d)[1] for d in (0.0, 0.1, 0.3)]
    assert 0.5 > fits[0] > fits[1] > fits[2] > 0
    assert fitted_outside(features, pseudo)[1] == fits[1]


def test_two_prompts_inside_are_told_apart_as_well_as_on_a_grid() -> None:
    features, labels, embeddings = world(0.4, 0.1, 0.6)
    logits = torch.from_numpy(logits_by_hand(features, embeddings, SCALE))
    hand_written, good, bad = fitted_inside(features, labels, embeddings)
    assert good > 0.4  # of at most a half
    assert bad < 0.25
    assert hand_written + good + bad == pytest.approx(1, abs=1e-12)
    own = torch.tensor([2 * good, 2 * bad], dtype=torch.float64)
    grid = torch.from_numpy(GRID[::25])
    least = min(inside_loss(pair, logits, labels) for pair in torch.cartesian_prod(grid, grid))
    assert inside_loss(own, logits, labels) < least + 1e-3


def test_two_prompts_outside_are_fitted_each_alone_on_the_whole_share() -> None:
    features, pseudo = overconfident(10)
    sure = pseudo[1]
    unsure = 0.7 * sure
    alone = [fitted_outside(features, torch.stack([pseudo[0], t]))[1] for t in (sure, unsure)]
    both = fitted_outside(features, torch.stack([pseudo[0], sure, unsure]))
    assert alone[0] < alone[1] < 0.5
    assert both[1:] == pytest.approx([share / 2 for share in alone], abs=1e-4)
    assert sum(both) == pytest.approx(1, abs=1e-12)


def test_fits_start_at_a_half_and_descend_at_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, embeddings = world(0.6, 0.02)
    outside, pseudo = overconfident(10)

    def fits(steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        monkeypatch.setattr(mixtures, "_STEPS", steps)
        inside = fitted_inside(features, labels, embeddings)
        return inside, fitted_outside(outside, pseudo)

    assert fits(0) == ((0.5, 0.5), (0.5, 0.5))
    monkeypatch.setattr(mixtures, "_LEARNING_RATE", 0.25)
    raw = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    logits = torch.from_numpy(logits_by_hand(features, embeddings, SCALE))
    inside_loss(raw.sigmoid(), logits, labels).backward()
    assert raw.grad is not None
    expected = 1 / (1 + math.exp(0.25 * raw.grad.item()))
    once, more = fits(1), fits(5)
    assert once[0][1] == pytest.approx(expected, rel=1e-6)
    assert 0.5 < once[0][1] < more[0][1]
    assert 0.5 > once[1][1] > more[1][1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_are_fitted_in_float32(dtype: torch.dtype) -> None:
    features, labels, embeddings = world(0.35, 0.3)
    half, rows = features.to(dtype), embeddings.to(dtype)
    assert fitted_inside(half, labels, rows) == fitted_inside(half.float(), labels, rows.float())
    assert fitted_outside(half, rows) == fitted_outside(half.float(), rows.float())


def test_fits_repeat_to_the_bit_also_without_gradients_and_under_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mixtures, "_START", 0.9)
    monkeypatch.setattr(mixtures, "_STEPS", 50)
    features, labels, embeddings = (
        v.float() if v.is_floating_point() else v for v in world(0.5, 0.4)
    )
    embeddings.requires_grad_()

    def fits() -> tuple[tuple[float, ...], ...]:
        inside = fitted_inside(features, labels, embeddings)
        return inside, fitted_outside(features, embeddings, 0.3)

    first = fits()
    assert first[1][1] < 0.89  # so the outside loss did something
    assert fits() == first
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fits() == first
    assert embeddings.grad is None


# --- the mixture --------------------------------------------------------------------------------


def test_rows_are_weighted_sums_by_whether_a_class_was_tuned_never_renormalised() -> None:
    mixture = Mixture((0.2, 0.5, 0.3), (0.7, 0.1, 0.2))
    embeddings, tuned = normalize(random(3, 4, 5), dim=2), [True, False, False, True]
    rows = mixture.rows(embeddings, tuned)
    for index, own in enumerate(tuned):
        pi = mixture.inside if own else mixture.outside
        expected = sum(pi[i] * embeddings[i, index].numpy() for i in range(3))
        np.testing.assert_allclose(rows[index].numpy(), expected, rtol=1e-12)
    assert rows.norm(dim=1).max() < 0.95


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_half_precision_embeddings_are_float32(dtype: torch.dtype) -> None:
    mixture, half = Mixture((0.3, 0.7), (0.9, 0.1)), random(2, 3, 5).to(dtype)
    rows = mixture.rows(half, [True, False, True])
    assert rows.dtype == torch.float32
    assert torch.equal(rows, mixture.rows(half.float(), [True, False, True]))


def test_one_learned_prompt_alone_is_itself_to_the_bit() -> None:
    embeddings = random(2, 4, 8).float()
    assert torch.equal(Mixture.learned_only(1).rows(embeddings, [True, False] * 2), embeddings[1])


@pytest.mark.parametrize("learned", [1, 2, 3, 7])
def test_learned_only_is_equal_parts_of_all_but_the_first(learned: int) -> None:
    mixture = Mixture.learned_only(learned)
    assert mixture.inside == mixture.outside == (0.0, *[1 / learned] * learned)
    embeddings = random(learned + 1, 2, 8)
    mean = embeddings[1:].mean(dim=0)
    torch.testing.assert_close(mixture.rows(embeddings, [True, False]), mean)


@pytest.mark.parametrize(("shape", "tuned"), [((1, 3, 4), 3), ((3, 3, 4), 3), ((2, 3, 4), 1)])
def test_embeddings_of_other_prompts_or_classes_are_refused(
    shape: tuple[int, ...], tuned: int
) -> None:
    with pytest.raises(ValueError, match="2 components"):
        Mixture.learned_only(1).rows(torch.zeros(shape), [True] * tuned)


def test_a_fitted_mixture_survives_json_to_the_bit() -> None:
    features, labels, embeddings = world(0.35, 0.3, 0.4)
    inside = fitted_inside(features, labels, embeddings)
    mixture = Mixture(inside, fitted_outside(features, embeddings))
    assert Mixture.from_dict(json.loads(json.dumps(mixture.to_dict())), learned=2) == mixture
    assert Mixture.from_dict({"inside": [0, 1], "outside": [0.5, 0.5]}, 1).inside == (0.0, 1.0)


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"inside": [0.5, 0.5]},
        {"inside": [0.5, 0.25, 0.25], "outside": [0.5, 0.25, 0.25]},
        {"inside": [0.5, 0.5], "outside": [0.5, 0.5], "more": [0.5, 0.5]},
        *(
            {**{"inside": [0.5, 0.5], "outside": [0.5, 0.5]}, side: wrong}
            for side in ("inside", "outside")
            for wrong in (
                "10",
                0.5,
                None,
                [],
                [1.0],
                [0.5, 0.25, 0.25],
                ["0.5", "0.5"],
                [True, False],
                [0.5, None],
                [0.5, 0.6],
                [0.5, 0.4],
                [1.5, -0.5],
                [-0.5, 1.5],
                [math.nan, 1.0],
                [1.0, math.nan],
                [math.inf, -math.inf],
                [math.inf, 0.0],
            )
        ),
    ],
)
def test_a_bad_form_is_a_run_error(content: Any) -> None:
    with pytest.raises(RunError, match="mixture: expected"):
        Mixture.from_dict(content, learned=1)


def test_weights_that_are_no_mixture_cannot_be_held() -> None:
    for inside, outside in (((1.0,), (1.0,)), ((0.5, 0.5), (0.2, 0.4, 0.4)), ((), ())):
        with pytest.raises(RunError, match="at least 2"):
            Mixture(inside, outside)
    with pytest.raises(RunError, match="nan"):
        Mixture((0.5, 0.5), (math.nan, math.nan))


# --- pseudo-classes -----------------------------------------------------------------------------


def test_pseudo_classes_are_as_many_different_words_as_asked_chosen_by_the_seed() -> None:
    drawn = [tuple(pseudo_class_names(WORDS, 8, seed, [])) for seed in range(20)]
    for names in drawn:
        assert len(names) == len(set(names)) == 8
        assert set(names) <= set(WORDS)
    assert len(set(drawn)) == 20
    assert set().union(*drawn) == set(WORDS)
    assert drawn[3] == tuple(pseudo_class_names(WORDS, 8, 3, []))
    assert pseudo_class_names(WORDS, 0, 0, []) == []


def test_class_names_and_their_parts_are_never_drawn() -> None:
    words = ["dog", "fish", "gold", "hot", "otter", "polar", "doggo", "sea_lion", "zebra"]
    exclude = ["Hot dog", "goldfish", "polar_bear", "Otter", "ZEBRAS"]
    assert pseudo_class_names(words, 2, 0, exclude) in (
        ["doggo", "sea_lion"],
        ["sea_lion", "doggo"],
    )


def test_too_small_a_vocabulary_says_how_small() -> None:
    assert sorted(pseudo_class_names(WORDS, 19, 0, ["worda"])) == WORDS[1:]
    with pytest.raises(ModelError, match=r"expected 20 words.*only 19"):
        pseudo_class_names(WORDS, 20, 0, ["worda"])
