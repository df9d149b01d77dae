"""What is fitted after the tuning, against the images and settings that it shall be fitted with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from capt_train import pipeline
from capt_train.config import TrainConfig
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.method.mixture import Mixture, component_logits, fit_inside, fit_outside
from capt_train.run.fitting import Outcome, fit
from capt_train.run.setup import Setup, prepare

MARGIN = 0.02  # not the default
Tuned = tuple[Setup, Outcome, Mixture]


@pytest.fixture(scope="module")
def tuned(configure: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Return a tuning of both sides of half of the classes, and the mixture fitted to it."""
    few = {"visual_views": 2, "visual_strength": "1", "visual_learning_rate": 0.02}
    few |= {"tuning_learning_rate": 0.02, "mixture_margin": MARGIN}
    config = configure(method="cocoa", added=("adapter",), classes="base", shots=6, **few)
    return fitted(config, tmp_path_factory.mktemp("runs") / "run")


def fitted(config: TrainConfig, run: Path) -> Tuned:
    setup = prepare(config, run, False, None)
    with closing(EmbeddingCache(setup.model_sha256)) as cache:
        setup, outcome = pipeline._tune(setup, cache, run, pipeline._Stopwatch())
    return setup, outcome, fit(setup, outcome, run)[0].fitted.mixture


def held_out(outcome: Outcome) -> Tensor:
    """Return tuned embeddings of the validation images, on which nothing was tuned."""
    assert outcome.task.val_tokens is not None
    return outcome.learner.embed_tokens(outcome.task.val_tokens)


def classes(setup: Setup, outcome: Outcome, names: list[str]) -> Tensor:
    """Return hand-written and learned embeddings."""
    [prompt] = outcome.learner.prompts
    hand_written = setup.backbone.text_embeddings([f"a photo of a {name}." for name in names])
    with torch.no_grad():
        return torch.stack([hand_written, prompt.of_names(names)])


def inside(setup: Setup, outcome: Outcome, images: Tensor, labels: Tensor) -> Any:
    logits = component_logits(
        images, classes(setup, outcome, setup.tuned_names), setup.backbone.scale
    )
    return pytest.approx(fit_inside(logits, labels), abs=1e-4)


def test_inside_the_mixture_is_fitted_on_validation_images(tuned: Tuned) -> None:
    setup, outcome, mixture = tuned
    task = outcome.task
    images, labels = held_out(outcome), task.val.labels
    assert mixture.inside == inside(setup, outcome, images, labels)
    assert mixture.inside != inside(setup, outcome, task.train.embeddings, task.train.labels)
    frozen = task.val.embeddings  # as the frozen tower has them
    assert mixture.inside != inside(setup, outcome, frozen, labels)


def test_without_validation_images_the_mixture_is_fitted_on_training_images(
    configure: Callable[..., TrainConfig], photos: Path, tmp_path: Path
) -> None:
    config = configure(method="cocoa", data=str(photos / "train"), shots=None)
    setup, outcome, mixture = fitted(config, tmp_path / "run")
    train = outcome.task.train
    assert mixture.inside == inside(setup, outcome, train.embeddings, train.labels)


def test_outside_the_mixture_is_fitted_on_validation_images_with_the_given_margin(
    tuned: Tuned,
) -> None:
    setup, outcome, mixture = tuned
    pseudo, images = classes(setup, outcome, setup.pseudo_class_names()), held_out(outcome)

    def outside(images: Tensor, *margin: float) -> Any:
        logits = component_logits(images, pseudo, setup.backbone.scale)
        return pytest.approx(fit_outside(logits, *margin), abs=1e-4)

    assert mixture.outside == outside(images, MARGIN)
    assert mixture.outside != outside(outcome.task.train.embeddings, MARGIN)
    assert mixture.outside != outside(images)
