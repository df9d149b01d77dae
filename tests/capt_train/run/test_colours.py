"""The map to natural colours: its closed form, and the rule that decides about it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from capt_train.calibrate.temperature import fit_temperature
from capt_train.clip.backbone import Backbone
from capt_train.clip.colour_map import ColourMap
from capt_train.run import colours
from capt_train.run.colours import ColourFit, fit_colours, natural_colours

PHOTO = "a photo of a {}."
NAMES = ("cat", "dog", "boat", "tree")


def noise(count: int, seed: int = 0) -> Tensor:
    """Return images whose pixels have correlated channels."""
    draw = torch.Generator().manual_seed(seed)
    grey = torch.rand(count, 16, 16, 1, generator=draw)
    colours = torch.rand(count, 16, 16, 3, generator=draw)
    return (255 * (0.7 * grey + 0.3 * colours)).round().to(torch.uint8)


def mapped_rgb(colours: ColourMap, backbone: Backbone, pixels: Tensor) -> np.ndarray:
    """Return RGB in [0, 1] of the mapped pixels, (pixels, 3)."""
    images = colours(backbone.normalise(pixels)).permute(0, 2, 3, 1).double().numpy()
    rgb: np.ndarray = images * backbone.preprocess.std + backbone.preprocess.mean
    return rgb.reshape(-1, 3)


def test_mapped_pixels_have_mean_and_covariance_of_natural_photos(tiny_backbone):
    pixels = noise(8)
    colours = natural_colours(pixels, tiny_backbone.preprocess)
    rgb = mapped_rgb(colours, tiny_backbone, pixels)
    np.testing.assert_allclose(rgb.mean(axis=0), [0.4814, 0.4578, 0.4082], atol=1e-4)
    covariance = np.cov(rgb.T)
    values, axes = np.linalg.eigh(covariance)
    np.testing.assert_allclose(values[::-1], [0.2175, 0.0188, 0.0045], rtol=0.01)
    np.testing.assert_allclose(np.abs(axes[:, 2]), [0.5675, 0.5808, 0.5836], atol=2e-3)


def test_it_is_the_symmetric_positive_map_which_moves_colours_least(tiny_backbone):
    colours = natural_colours(noise(8), tiny_backbone.preprocess)
    deviation = torch.tensor(tiny_backbone.preprocess.std)
    matrix = colours.matrix * deviation[:, None] / deviation
    torch.testing.assert_close(matrix, matrix.T, atol=1e-5, rtol=0)
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_a_linear_shift_of_colours_is_undone(tiny_backbone):
    def camera(pixels: Tensor) -> Tensor:
        x = pixels.double() / 255
        grey = x.mean(dim=-1, keepdim=True)
        return (255 * (0.8 * (0.25 * x + 0.75 * grey) + 0.1)).round().to(torch.uint8)

    pixels = noise(8)
    natural = natural_colours(pixels, tiny_backbone.preprocess)
    restored = natural_colours(camera(pixels), tiny_backbone.preprocess)
    np.testing.assert_allclose(
        mapped_rgb(restored, tiny_backbone, camera(pixels)),
        mapped_rgb(natural, tiny_backbone, pixels),
        atol=0.15,  # rounding to 8 bits, enlarged
    )


def test_images_without_colours_keep_finite_values(tiny_backbone):
    for pixels in (noise(8)[..., :1].expand(-1, -1, -1, 3), torch.full((8, 16, 16, 3), 7).byte()):
        colours = natural_colours(pixels, tiny_backbone.preprocess)
        assert colours.matrix.isfinite().all() and colours.matrix.abs().max() < 255


class Scripted(Backbone):
    """Stands for a backbone with given embeddings of the mapped images."""

    def __init__(self, mapped: Tensor, backbone: Backbone) -> None:
        self.mapped, self.preprocess, self.scale = mapped, backbone.preprocess, 3.0
        self.seen = 0

    def recoloured(self, colours: ColourMap | None) -> Scripted:
        return self

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        return self.mapped[self.seen - len(pixels) : self.seen]


def decide(backbone: Backbone, before: Tensor, after: Tensor, labels: Tensor) -> tuple[Any, int]:
    """Return the decision, and how many images were embedded through the map."""
    scripted = Scripted(after, backbone)

    return fit_colours(scripted, torch.eye(4), noise(len(labels)), labels, before), scripted.seen


def embeddings(labels: Tensor, sure: float, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    random = torch.randn(len(labels), 4, generator=draw)
    return random + sure * torch.nn.functional.one_hot(labels, 4)


def losses(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Return `log Σ_c exp(z_c/T) − z_y/T` of each image, at the best T for all of them."""
    scaled = logits.double().numpy() / fit_temperature(logits, labels)
    of_labels = scaled[np.arange(len(scaled)), labels.numpy()]
    return np.log(np.exp(scaled).sum(axis=1)) - of_labels


def test_a_sure_gain_is_measured_on_all_images(tiny_backbone):
    labels = torch.arange(200) % 4
    before, after = embeddings(labels, 1.0, 1), embeddings(labels, 3.0, 2)
    fit, _ = decide(tiny_backbone, before, after, labels)
    gains = losses(3 * before, labels) - losses(3 * after, labels)
    assert fit.colours is not None
    assert fit.gain == pytest.approx(gains.mean(), abs=1e-4)
    assert fit.standard_error == pytest.approx(gains.std(ddof=1) / math.sqrt(200), abs=1e-4)


@pytest.mark.parametrize(
    ("gain", "error", "kept"),
    [(0.2, 0.09, True), (0.2, 0.11, False), (0.06, 0.02, True), (0.04, 0.005, False)],
)
def test_a_gain_must_be_sure_and_large_enough(gain, error, kept, tiny_backbone, monkeypatch):
    count = 40
    spread = error * math.sqrt(count - 1) * (1 - 2 * (torch.arange(count) % 2))
    mapped_losses = 5 - gain - spread
    answers = iter([torch.full((count,), 5.0), mapped_losses])
    monkeypatch.setattr(colours, "calibrated_losses", lambda *_: next(answers))
    labels = torch.arange(count) % 4
    fit, _ = decide(tiny_backbone, *[embeddings(labels, 1.0, 1)] * 2, labels)
    assert (fit.gain, fit.standard_error) == pytest.approx((gain, error), abs=1e-5)
    assert (fit.colours is not None) == kept


def test_where_the_first_images_do_not_gain_no_others_are_embedded(tiny_backbone):
    labels = torch.arange(200) % 4
    before = embeddings(labels, 2.0, 1)
    fit, seen = decide(tiny_backbone, before, embeddings(labels, 1.0, 2), labels)
    assert fit.colours is None and fit.gain < 0 and seen == 64
    fit, seen = decide(tiny_backbone, before, embeddings(labels, 5.0, 2), labels)
    assert fit.colours is not None and seen == 200


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_images_decide_nothing(count, tiny_backbone):
    labels = torch.arange(count) % 4
    rows = embeddings(labels, 1.0, 1)
    assert decide(tiny_backbone, rows, rows, labels) == (ColourFit(None, 0.0, 0.0), 0)


def test_the_gain_is_that_of_the_model_through_the_map(tiny_backbone):
    pixels, reference = noise(40), tiny_backbone.class_embeddings(NAMES, (PHOTO,))
    frozen = tiny_backbone.image_embeddings(pixels)
    natural = natural_colours(pixels, tiny_backbone.preprocess)
    after = tiny_backbone.recoloured(natural).image_embeddings(pixels)
    labels = torch.arange(40) % 4
    fit = fit_colours(tiny_backbone, reference, pixels, labels, frozen)
    before_losses, after_losses = (
        losses(tiny_backbone.scale * rows @ reference.T, labels) for rows in (frozen, after)
    )
    assert fit.gain == pytest.approx((before_losses - after_losses).mean(), abs=1e-3)
    assert tiny_backbone.colours is None


def test_a_fit_comes_back_from_json():
    for kept in (None, ColourMap(torch.eye(3) / 3, torch.ones(3) / 7)):
        fit = ColourFit(kept, 0.1, 0.025)
        read = ColourFit.from_dict(json.loads(json.dumps(fit.to_dict())))
        assert replace(read, colours=None) == replace(fit, colours=None)
        assert read.to_dict() == fit.to_dict()
