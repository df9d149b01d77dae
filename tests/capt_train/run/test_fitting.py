"""What is fitted after the tuning, against the images and settings that it shall be fitted with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
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
    run = tmp_path_factory.mktemp("runs") / "run"
    few = {
        "visual_views": 2,
        "visual_strength": "1",
        "tuning_learning_rate": 0.02,
        "shots": 6,
    }
    few |= {"visual_learning_rate": 0.02, "mixture_margin": MARGIN}
    setup = prepare(
        configure(method="cocoa", added=("adapter",), classes="base", **few), run, False, None
    )
    with closing(EmbeddingCache(setup.model_sha256)) as cache:
        outcome = pipeline._tune(setup, cache, run)
    return setup, outcome, fit(setup, outcome, run).fitted.mixture


def held_view(outcome: Outcome) -> Tensor:
    """Return tuned embeddings of the images' second view, on which nothing was tuned."""
    assert outcome.views.tokens is not None
    assert len(outcome.views.tokens) == 2
    return outcome.learner.embed_tokens(outcome.views.tokens[1])


def classes(setup: Setup, outcome: Outcome, names: list[str]) -> Tensor:
    """Return hand-written and learned embeddings."""
    [prompt] = outcome.learner.prompts
    hand_written = setup.backbone.text_embeddings([f"a photo of a {name}." for name in names])
    with torch.no_grad():
        return torch.stack([hand_written, prompt.of_names(names)])


def test_inside_the_mixture_is_fitted_on_the_view_that_was_not_tuned_on(tuned: Tuned) -> None:
    setup, outcome, mixture = tuned
    labels, texts = outcome.task.train.labels, classes(setup, outcome, setup.tuned_names)

    def fitted(images: Tensor) -> Any:
        logits = component_logits(images, texts, setup.backbone.scale)
        return pytest.approx(fit_inside(logits, labels), abs=1e-4)

    assert mixture.inside == fitted(held_view(outcome))
    assert mixture.inside != fitted(outcome.task.train.embeddings)
    assert mixture.inside != fitted(outcome.views.embeddings[1])  # as the frozen tower has it


def test_outside_the_mixture_is_fitted_on_that_view_with_the_margin_asked_for(tuned: Tuned) -> None:
    setup, outcome, mixture = tuned
    pseudo, held = classes(setup, outcome, setup.pseudo_class_names()), held_view(outcome)

    def fitted(images: Tensor, *margin: float) -> Any:
        logits = component_logits(images, pseudo, setup.backbone.scale)
        return pytest.approx(fit_outside(logits, *margin), abs=1e-4)

    assert mixture.outside == fitted(held, MARGIN)
    assert mixture.outside != fitted(outcome.task.train.embeddings, MARGIN)
    assert mixture.outside != fitted(held)
