"""Fitting the colour map: on pictures that a camera washed out, and the rule that decides."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from capt_train.calibrate.temperature import fit_temperature
from capt_train.clip.backbone import Backbone
from capt_train.clip.colour_map import ColourMap
from capt_train.clip.loading import load_backbone
from capt_train.tune import colours
from capt_train.tune.colours import ColourFit, Labelled, fit_colours

ROOT = Path(__file__).resolve().parents[3]
# The examples are no part of the installed package.
sys.path.insert(0, str(ROOT))

from examples.demo.drawing import render  # noqa: E402
from examples.demo.vocabulary import BASE_CLASSES  # noqa: E402

NAMES = BASE_CLASSES[:10]
DEMO = ROOT / "examples" / "demo" / "model"
PHOTO = "a photo of a {}."


def camera(pixels: Tensor) -> Tensor:
    """Wash colours out: `0.8·(0.25·x + 0.75·grey(x)) + 0.1` on [0, 1]."""
    x = pixels.double() / 255
    grey = (x * torch.tensor([0.3, 0.59, 0.11])).sum(dim=-1, keepdim=True)
    return (255 * (0.8 * (0.25 * x + 0.75 * grey) + 0.1)).round().to(torch.uint8)


def drawn(count: int, seed: int) -> Labelled:
    """Return pictures, `count` a class."""
    random = np.random.default_rng(seed)
    pictures = [np.asarray(render(name, random)) for name in NAMES for _ in range(count)]
    labels = torch.arange(len(NAMES)).repeat_interleave(count)
    return Labelled(torch.from_numpy(np.stack(pictures)), labels)


def washed(images: Labelled) -> Labelled:
    return replace(images, pixels=camera(images.pixels))


@pytest.fixture(scope="module")
def demo() -> Backbone:
    return load_backbone(f"local-dir:{DEMO}", None, torch.device("cpu"))


@pytest.fixture(scope="module")
def pictures() -> tuple[Labelled, Labelled]:
    """Return pictures to fit on, and others that decide."""
    return drawn(5, seed=1), drawn(5, seed=2)


def fit_demo(demo: Backbone, train: Labelled, deciding: Labelled) -> ColourFit:
    reference = demo.class_embeddings(NAMES, (PHOTO,))
    return fit_colours(demo, reference, train, deciding, steps=24, rate=0.15, seed=1)


@pytest.fixture(scope="module")
def restored(demo: Backbone, pictures: tuple[Labelled, Labelled]) -> tuple[ColourFit, Any]:
    """Return the fit on washed-out pictures, and the model's state before it."""
    before = {name: value.clone() for name, value in demo.model.state_dict().items()}
    return fit_demo(demo, *map(washed, pictures)), before


def losses(backbone: Backbone, images: Labelled) -> np.ndarray:
    """Return `log Σ_c exp(z_c/T) − z_y/T` of each image, at the best T for them all."""
    reference = backbone.class_embeddings(NAMES, (PHOTO,))
    logits = backbone.scale * backbone.image_embeddings(images.pixels) @ reference.T
    scaled = logits.double().numpy() / fit_temperature(logits, images.labels)
    own = scaled[np.arange(len(scaled)), images.labels.numpy()]
    return np.log(np.exp(scaled).sum(axis=1)) - own


def test_washed_out_colours_are_restored_for_images_that_nobody_has_seen(demo, restored):
    fit, _ = restored
    assert fit.colours is not None
    test = washed(drawn(8, seed=3))
    before, after = losses(demo, test), losses(demo.recoloured(fit.colours), test)
    assert after.mean() < before.mean() - 0.2
    # colours that were as near to grey as a quarter are far from it again
    pure = torch.tensor([[0.5, -0.25, -0.25]])[..., None, None]
    assert (fit.colours(pure) - fit.colours(0 * pure)).abs().max() > 2 * pure.abs().max()


def test_the_gain_is_that_of_the_images_that_decide(demo, restored, pictures):
    fit, _ = restored
    deciding = washed(pictures[1])
    better = losses(demo, deciding) - losses(demo.recoloured(fit.colours), deciding)
    assert fit.gain == pytest.approx(better.mean(), abs=1e-4)
    error = better.std(ddof=1) / math.sqrt(len(better))
    assert fit.standard_error == pytest.approx(error, abs=1e-4)


def test_the_model_itself_stays_as_it_was(demo, restored):
    _, before = restored
    after = demo.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in demo.model.parameters())
    assert demo.colours is None


def test_colours_that_the_model_knows_stay_as_they_are(demo, pictures):
    fit = fit_demo(demo, *pictures)
    assert fit.colours is None
    assert fit.gain <= 2 * fit.standard_error


# The rest needs no model that knows anything.


def noise(count: int, seed: int) -> Labelled:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return Labelled(pixels, torch.arange(count) % 4)


def fit_noise(backbone: Backbone, train: Labelled, deciding: Labelled, **other: Any) -> ColourFit:
    reference = backbone.class_embeddings(("cat", "dog", "boat", "tree"), (PHOTO,))
    own: dict[str, Any] = {"steps": 8, "rate": 0.15, "seed": 1, **other}
    return fit_colours(backbone, reference, train, deciding, **own)


Script = Callable[[Sequence[Sequence[float]]], list[ColourMap | None]]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Return a function that takes what each image gains by the map of each round.

    It returns the maps that will be asked about: none first, then one a round.
    """

    def scripted(gains: Sequence[Sequence[float]]) -> list[ColourMap | None]:
        asked: list[ColourMap | None] = []
        answers = iter([torch.full((len(gains[0]),), 5.0), *(5 - torch.tensor(g) for g in gains)])

        def answer(backbone: Backbone, *_: Any) -> Tensor:
            asked.append(backbone.colours)
            return next(answers)

        monkeypatch.setattr(colours, "_losses", answer)
        return asked

    return scripted


def around(mean: float) -> list[float]:
    """Return gains of four images whose standard error is 1/√3 = 0.577."""
    return [mean - 1, mean + 1, mean - 1, mean + 1]


@pytest.mark.parametrize(("mean", "kept"), [(1.2, True), (1.1, False), (0.5, False)])
def test_it_takes_two_standard_errors_to_be_kept(mean, kept, tiny_backbone, scripted):
    scripted([around(mean)] * 4)
    fit = fit_noise(tiny_backbone, noise(8, 0), noise(4, 1))
    assert (fit.colours is not None) == kept
    assert fit.gain == pytest.approx(mean)
    assert fit.standard_error == pytest.approx(1 / math.sqrt(3))


def test_the_best_of_four_rounds_is_taken(tiny_backbone, scripted):
    asked = scripted([around(1.3), around(float("nan")), around(1.7), around(1.6)])
    fit = fit_noise(tiny_backbone, noise(8, 0), noise(4, 1))
    assert len(asked) == 5 and asked[0] is None
    assert fit.gain == pytest.approx(1.7)
    assert fit.colours is asked[3]
    assert len({tuple(own.matrix.flatten().tolist()) for own in asked[1:]}) == 4


def test_after_half_of_the_steps_without_a_gain_it_is_given_up(tiny_backbone, scripted):
    asked = scripted([around(-1.0), around(0.0), around(9.0), around(9.0)])
    assert fit_noise(tiny_backbone, noise(8, 0), noise(4, 1)) == ColourFit(None, 0.0, 0.0)
    assert len(asked) == 3
    asked = scripted([around(-1.0), around(0.1), around(9.0), around(2.0)])
    assert fit_noise(tiny_backbone, noise(8, 0), noise(4, 1)).gain == pytest.approx(9.0)
    assert len(asked) == 5


@pytest.mark.parametrize("count", [0, 1])
def test_where_too_few_images_decide_nothing_is_kept(count, tiny_backbone):
    fit = fit_noise(tiny_backbone, noise(8, 0), noise(count, 1))
    assert fit == ColourFit(None, 0.0, 0.0)


def test_it_starts_as_the_identity_and_sees_every_image_once_some_mirrored(tiny_backbone):
    train, seen = noise(12, 0), []
    handle = tiny_backbone.model.visual.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].detach().clone())
    )
    fit_noise(tiny_backbone, train, noise(4, 1), steps=4)
    handle.remove()
    first = seen[1]  # before it the images that decide are asked
    plain = tiny_backbone.normalise(train.pixels)
    same, mirrored = (
        [[torch.equal(image, own) for own in images] for image in first]
        for images in (plain, plain.flip(3))
    )
    found = torch.tensor(same).int() + torch.tensor(mirrored).int()
    assert found.sum(dim=0).tolist() == found.sum(dim=1).tolist() == [1] * 12
    assert 0 < torch.tensor(mirrored).sum() < 12
    last = seen[-2]
    assert not any(torch.allclose(image, own, atol=0.05) for image in last for own in plain)


def test_of_many_images_a_step_sees_64_and_every_one_has_its_turn():
    # a class an image, so that labels tell the images apart
    images = replace(noise(96, 0), labels=torch.arange(96))
    batches = [labels.tolist() for _, labels in colours._minibatches(images, 6, seed=1)]
    assert {len(batch) for batch in batches} == {64}
    shown = [label for batch in batches[:3] for label in batch]
    assert sorted(shown) == sorted([*range(96)] * 2)


def test_a_step_in_small_pieces_is_the_step_of_the_whole_minibatch(tiny_backbone, monkeypatch):
    reference = tiny_backbone.class_embeddings([f"thing {n}" for n in range(4)], (PHOTO,))
    train, seen = noise(40, 0), []

    def noting(backbone: Backbone, *_: Any) -> Tensor:
        seen.append(backbone.colours)
        return torch.zeros(2)

    monkeypatch.setattr(colours, "_losses", noting)
    for pieces in (7, 64):
        monkeypatch.setattr(colours, "_TUNED_AT_ONCE", pieces)
        fit_colours(tiny_backbone, reference, train, noise(2, 1), steps=4, rate=0.01, seed=1)
    small, whole = seen[1], seen[4]  # each after its first step; the first of all is without a map
    assert len(seen) == 6
    torch.testing.assert_close(small.matrix, whole.matrix, atol=1e-4, rtol=0)
    assert (whole.matrix - torch.eye(3)).abs().max() > 1e-3


def test_the_seed_decides(tiny_backbone, scripted):
    def found(seed: int) -> ColourMap:
        scripted([around(number + 2.0) for number in range(4)])
        own = fit_noise(tiny_backbone, noise(80, 0), noise(4, 1), seed=seed).colours
        assert own is not None
        return own

    one, same, other = found(1), found(1), found(2)
    assert torch.equal(one.matrix, same.matrix) and torch.equal(one.offset, same.offset)
    assert not torch.equal(one.matrix, other.matrix)


def test_brightness_and_saturation_have_a_number_each():
    trained = colours._Trained()
    trained.log_gains.data = torch.tensor([0.7, -0.4])
    found = trained().detached()
    grey, colour = torch.ones(3), torch.tensor([0.5, -0.2, -0.3])
    torch.testing.assert_close(found.matrix @ grey, math.exp(0.7) * grey)
    torch.testing.assert_close(found.matrix @ colour, math.exp(-0.4) * colour)
    trained.log.data = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    there = trained().detached().matrix
    for parameter in (trained.log, trained.log_gains):
        parameter.data *= -1
    torch.testing.assert_close(trained().detached().matrix @ there, torch.eye(3))


def test_a_fit_comes_back_from_json():
    for own in (None, ColourMap(torch.eye(3) / 3, torch.ones(3) / 7)):
        fit = ColourFit(own, 0.1, 0.025)
        read = ColourFit.from_dict(json.loads(json.dumps(fit.to_dict())))
        assert (read.gain, read.standard_error) == (0.1, 0.025)
        assert (read.colours is None) == (own is None)
        assert read.to_dict() == fit.to_dict()
