"""The loss terms of published methods, against their formulas written out once more."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor
from torch.nn.functional import normalize

from capt_train.config import TrainConfig
from capt_train.method.loss_terms import Step
from capt_train.published.kgcoop import distance
from capt_train.published.prograd import general_knowledge, zero_shot_logits
from capt_train.published.promptkd import divergence
from capt_train.published.promptsrc import (
    gaussian,
    image_distance,
    logit_distance,
    text_distance,
)
from capt_train.published.tac import equal
from capt_train.published.zs_norm import normalised, normalised_cross_entropy
from capt_train.tune.precision import project

BATCH, CLASSES, DIM, SCALE = 5, 4, 8, 20.0


def unit(*shape: int, seed: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def step() -> Step:
    """Return a step with two prompts, a tuned visual side and a teacher."""
    texts, images = unit(2, CLASSES, DIM, seed=0), unit(BATCH, DIM, seed=1)
    return Step(
        SCALE * torch.einsum("bd,pcd->pbc", images, texts),
        torch.tensor([0, 3, 1, 2, 0]),
        SCALE,
        texts,
        unit(CLASSES, DIM, seed=2),
        images=images,
        frozen=unit(BATCH, DIM, seed=3),
        targets=torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(4)).softmax(1),
    )


def known(step: Step) -> np.ndarray:
    return SCALE * step.frozen.double().numpy() @ step.reference.double().numpy().T


def by_prompt(step: Step) -> list[np.ndarray]:
    return [log_softmax(logits.double().numpy(), axis=1) for logits in step.logits]


def test_kgcoop_is_the_mean_squared_distance_to_the_hand_written_embeddings(step: Step) -> None:
    sums = [
        ((step.texts[p, c] - step.reference[c]) ** 2).sum()
        for p in range(2)
        for c in range(CLASSES)
    ]
    torch.testing.assert_close(distance(step), torch.stack(sums).mean())
    cosines = torch.einsum("pcd,cd->pc", step.texts, step.reference)
    torch.testing.assert_close(distance(step) / 2, 1 - cosines.mean())  # as the authors' code


def test_prograd_compares_with_the_frozen_model(step: Step) -> None:
    assert np.allclose(zero_shot_logits(step).numpy(), known(step), atol=1e-5)
    probabilities = np.exp(log_softmax(known(step), axis=1))
    expected = np.mean([-(probabilities * own).sum(1).mean() for own in by_prompt(step)])
    assert float(general_knowledge(step)) == pytest.approx(expected, rel=1e-5)


def test_a_gradient_against_the_guide_loses_what_opposes_it() -> None:
    first, second, third = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
    first.grad = torch.tensor([1.0, -2.0, 0.5])
    second.grad = torch.tensor([1.0, -2.0, 0.5])
    guides = [torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]), torch.ones(3)]
    project([first, second, third], guides)
    torch.testing.assert_close(first.grad, torch.tensor([1.0, -1.25, 1.25]))
    assert float(first.grad @ guides[0]) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(second.grad, torch.tensor([1.0, -2.0, 0.5]))  # agrees
    assert third.grad is None


def test_promptsrc_stays_near_embeddings_and_logits_of_the_frozen_model(step: Step) -> None:
    texts, reference = step.texts.numpy(), step.reference.numpy()
    assert float(text_distance(step)) == pytest.approx(np.abs(texts - reference).mean(), rel=1e-5)
    images = np.abs(step.images.numpy() - step.frozen.numpy()).mean()
    assert float(image_distance(step)) == pytest.approx(images, rel=1e-5)
    log_known = log_softmax(known(step), axis=1)
    sums = [(np.exp(log_known) * (log_known - own)).sum() for own in by_prompt(step)]
    expected = np.mean(sums) / (BATCH * CLASSES)
    assert float(logit_distance(step)) == pytest.approx(expected, rel=1e-4)


def test_the_mean_over_epochs_is_gaussian() -> None:
    base, every = (TrainConfig("", "", classes=classes) for classes in ("base", "all"))
    for epoch in range(1, 21):  # mean 15 and deviation 1 of 20 epochs
        expected = math.exp(-0.5 * (epoch - 15) ** 2)
        assert gaussian(epoch, 20, base) == pytest.approx(expected)
    for epoch in range(1, 51):  # mean 30 and deviation 30 of 50
        expected = math.exp(-0.5 * ((epoch - 30) / 30) ** 2)
        assert gaussian(epoch, 50, every) == pytest.approx(expected)
    assert equal(1, 20, base) == equal(20, 20, base)


def test_distillation_is_the_divergence_from_the_teacher(step: Step) -> None:
    targets = step.targets.double().numpy()
    sums = [(targets * (np.log(targets) - own)).sum() for own in by_prompt(step)]
    assert float(divergence(step)) == pytest.approx(np.mean(sums) / (BATCH * CLASSES), rel=1e-4)


def test_normalised_logits_have_the_range_of_the_zero_shot_ones(step: Step) -> None:
    logits, frozen = step.logits[0], zero_shot_logits(step)
    found = normalised(logits, frozen)
    for own, before, zero_shot in zip(found, logits, frozen, strict=True):
        assert float(own.max()) == pytest.approx(float(zero_shot.max()), rel=1e-5)
        assert float(own.min()) == pytest.approx(float(zero_shot.min()), rel=1e-5)
        assert own.argsort().tolist() == before.argsort().tolist()
    expected = np.mean(
        [
            -log_softmax(normalised(z, frozen).double().numpy(), axis=1)[range(BATCH), step.labels]
            for z in step.logits
        ]
    )
    assert float(normalised_cross_entropy(step)) == pytest.approx(expected, rel=1e-5)
