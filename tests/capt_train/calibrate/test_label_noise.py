"""Wrong labels are counted where they are spread by chance, and only there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from capt_train.calibrate.label_noise import LabelNoise, fit_label_noise
from capt_train.calibrate.temperature import fit_temperature
from capt_train.method.losses import noisy_likelihood

IMAGES, CLASSES, TEMPERATURE = 2000, 12, 1.6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def truthful(images: int = IMAGES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a model that is right as often as it says at `TEMPERATURE`, and labels."""
    logits = 4 * torch.randn(images, CLASSES, generator=seeded(seed), dtype=torch.float64)
    labels = (logits / TEMPERATURE).softmax(dim=1).multinomial(1, generator=seeded(seed + 1))
    return logits, labels[:, 0]


def mislabelled(labels: Tensor, share: float, seed: int = 2) -> Tensor:
    """Labels of which a share is any other class instead."""
    rows = torch.randperm(len(labels), generator=seeded(seed))[: round(share * len(labels))]
    steps = torch.randint(1, CLASSES, (len(rows),), generator=seeded(seed + 1))
    return labels.index_put((rows,), (labels[rows] + steps) % CLASSES)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_share_and_temperature_are_found(share: float, seed: int) -> None:
    logits, labels = truthful(seed=seed)
    wrong = mislabelled(labels, share)
    found = fit_label_noise(logits, wrong)
    assert found.share == pytest.approx(share, abs=0.05)
    assert found.temperature == pytest.approx(fit_temperature(logits, labels), rel=0.12)
    assert fit_temperature(logits, wrong) > 1.2 * found.temperature


def test_nothing_explains_the_labels_better() -> None:
    logits, labels = truthful()
    labels = mislabelled(labels, 0.2)

    def loss(temperature: float, share: float) -> float:
        likelihood = noisy_likelihood(logits / temperature, labels, share)
        return 2 * math.log(temperature) ** 2 - likelihood.log().sum().item()

    found = fit_label_noise(logits, labels)
    others = [
        loss(found.temperature * factor, found.share + step)
        for factor in (0.5, 0.9, 0.97, 1.0, 1.03, 1.1, 2.0)
        for step in (-0.1, -0.01, 0.0, 0.01, 0.1)
    ]
    assert loss(found.temperature, found.share) <= min(others) + 0.01


@pytest.mark.parametrize("seed", range(0, 50, 10))
@pytest.mark.parametrize("images", [20, 200, IMAGES])
def test_right_labels_are_calibrated_on_as_without_it(images: int, seed: int) -> None:
    logits, labels = truthful(images, seed)
    found = fit_label_noise(logits, labels)
    assert (found.share, found.temperature) == (0.0, fit_temperature(logits, labels))


def test_classes_whose_names_say_nothing_are_no_wrong_labels() -> None:
    logits, labels = truthful()
    logits = logits[:, [1, 0, *range(2, CLASSES)]]
    found = fit_label_noise(logits, labels)
    assert (found.share, found.temperature) == (0.0, fit_temperature(logits, labels))


def test_wrong_labels_that_the_model_finds_likely_are_not_found() -> None:
    logits, labels = truthful()
    rivals = logits.scatter(1, labels[:, None], -math.inf).argmax(dim=1)
    labels = torch.where(torch.arange(IMAGES) % 5 == 0, rivals, labels)
    assert fit_label_noise(logits, labels).share == 0.0


def test_with_a_share_that_is_known_only_the_temperature_is_fitted() -> None:
    logits, labels = truthful()
    wrong = mislabelled(labels, 0.2)
    known = fit_label_noise(logits, wrong, 0.2)
    assert known.share == 0.2
    assert known.temperature == pytest.approx(fit_temperature(logits, labels), rel=0.1)
    assert fit_label_noise(logits, wrong, 0.0) == LabelNoise(0.0, fit_temperature(logits, wrong))
    two = fit_label_noise(logits[:, :2], labels.clamp(max=1), 0.1)  # where none would be found
    assert two.share == 0.1


def test_a_few_odd_images_are_no_wrong_labels() -> None:
    logits, labels = truthful()
    odd = torch.arange(IMAGES) % (IMAGES // 8) == 0
    labels = torch.where(odd, logits.argmin(dim=1), labels)
    found = fit_label_noise(logits, labels)
    assert (found.share, found.temperature) == (0.0, fit_temperature(logits, labels))


@pytest.mark.parametrize(("images", "classes"), [(0, 5), (1, 5), (1, 1), (8, 2)])
def test_where_nothing_can_be_told_none_are_wrong(images: int, classes: int) -> None:
    logits = 9 * torch.randn(images, classes, generator=seeded(0))
    labels = torch.zeros(images, dtype=torch.long)
    found = fit_label_noise(logits, labels)
    assert found.share == 0.0
    assert math.isfinite(found.temperature)


def test_extreme_logits_do_no_harm() -> None:
    logits = 1e4 * torch.eye(CLASSES).repeat(20, 1)
    labels = mislabelled(torch.arange(CLASSES).repeat(20), 0.2)
    found = fit_label_noise(logits, labels)
    assert found.share == pytest.approx(0.2, abs=0.01)
    assert math.isfinite(found.temperature)
