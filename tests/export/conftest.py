"""Runs whose images are the frozen model's: what can be merged, and has zero-shot rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from capt_deploy.confidence.calibration import Calibration
from capt_train.method.mixture import Mixture
from capt_train.pipeline import train
from capt_train.run.folder import TunedModel, load_run, mixed_rows
from tests.configs import train_config

TRAINED = {"shots": 4, "tuning_epochs": 2, "prompt_depth": 2, "prompt_count": 2}
TRAINED |= {"map_side": "classes", "map_ridge": 0.003}
WITHOUT = ("colours", "visual", "rows")  # rows calibrate classes without photos, where --dac would
TEMPLATES = ("a photo of a {}.", "the {} in a picture")


def shaken(model: TunedModel, seed: int = 0) -> TunedModel:
    """Return a run as if it had been tuned for long: every part far from its start."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.learner.text_parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    if (class_map := model.learner.class_map) is not None:
        class_map.matrix.data += 0.1 * torch.randn(class_map.matrix.shape, generator=draw)
    learned = model.learner.learned
    mixture = Mixture.learned_only(learned)
    if "mixture" in model.config.parts:
        parts = [2 * (number + 1) / learned / (learned + 1) for number in range(learned)]
        trust = 0.4 + 0.02 * seed
        outside = (1 - trust, *(trust * part for part in parts))
        mixture = Mixture((0.2, *(0.8 * part for part in parts)), outside)
    fitted = replace(
        model.fitted, mixture=mixture, calibration=Calibration(1.7), zero_shot_temperature=0.8
    )
    rows = mixed_rows(model.learner, model.zero_shot, model.split, fitted)
    return replace(model, class_rows=rows, fitted=fitted)


@torch.no_grad()
def by_hand(model: TunedModel, name: str) -> Tensor:
    """Return Ŵ_c of a class that nobody was tuned on, one prompt after the other."""
    backbone, learner = model.backbone, model.learner
    texts = [template.replace("{}", name) for template in model.config.prompt.templates]
    embeddings = [normalize(backbone.text_embeddings(texts).mean(dim=0), dim=0)]
    tokens = backbone.tokenize([f"a a a a {name}."])
    for prompt in learner.prompts:
        own = backbone.text.encode(tokens, prompt.context, prompt.deeper)
        embeddings.append(learner.transform(own)[0][0])
    weights = model.fitted.mixture.outside
    return sum(weight * own for weight, own in zip(weights, embeddings, strict=True))


@pytest.fixture(scope="session")
def text_run(
    tiny_model_dir: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return a function that tunes text sides with all their parts, each setting once."""
    runs: dict[str, Path] = {}

    def tune(**settings: Any) -> Path:
        if repr(settings) not in runs:
            run = tmp_path_factory.mktemp("text-runs") / "run"
            model = f"local-dir:{tiny_model_dir}"
            own = {
                "data": str(photos),
                "model": model,
                "method": "full",
                "prompt_templates": TEMPLATES,
            }
            own |= {"without": WITHOUT, "classes": "base", **TRAINED}
            train(train_config(**{**own, **settings}), run)
            runs[repr(settings)] = run
        return runs[repr(settings)]

    return tune


@pytest.fixture(scope="session")
def text_model(text_run: Callable[..., Path]) -> TunedModel:
    """Return one of them, shaken: two of four classes tuned, two prompts, a mixture."""
    return shaken(load_run(text_run()))


@pytest.fixture(scope="session")
def whole_model(text_run: Callable[..., Path]) -> TunedModel:
    """Return one that is tuned on all of its classes, as vector scaling needs; shaken."""
    return shaken(load_run(text_run(classes="all")))
