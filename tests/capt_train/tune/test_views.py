from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from capt_deploy.core.errors import ImageError
from capt_deploy.data.datasets import Dataset, Item, read_dataset
from capt_deploy.data.preprocess import preprocess
from capt_train.clip.backbone import Backbone
from capt_train.clip.colour_map import ColourMap
from capt_train.config import TrainConfig
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.learner import Learner, make_learner
from capt_train.tune.views import Views, augment, embed_views


@pytest.fixture
def dataset(photos: Path) -> Dataset:
    return read_dataset(photos)


def make(backbone: Backbone, method: str = "capt") -> Learner:
    added = ("adapter", "sample-experts") if method == "capt" else ()
    config = TrainConfig(data="", model="", method=method, added=added)
    split = FewShotSplit(("red ball", "blue sky"), (0, 1), (), (), {})
    zero_shot = backbone.class_embeddings(split.class_names, config.prompt.templates)
    return make_learner(backbone, config, split, zero_shot)


def embed(
    backbone: Backbone, learner: Learner, dataset: Dataset, items: Any, **other: Any
) -> Views:
    own: dict[str, Any] = {"views": 3, "area": 0.6, "seed": 4, "label": "photos", **other}
    return embed_views(backbone, learner, dataset, items, **own)


def pixels_of(backbone: Backbone, dataset: Dataset, items: Sequence[Item]) -> torch.Tensor:
    own = [preprocess(dataset.path(item), backbone.preprocess) for item in items]
    return torch.from_numpy(np.stack(own))


def test_view_0_is_the_image_itself_and_the_others_are_not(tiny_backbone, dataset):
    items = dataset.splits["train"][::-1][:5]
    learner = make(tiny_backbone)
    views = embed(tiny_backbone, learner, dataset, items)
    assert views.embeddings.shape == (3, 5, 32)
    assert views.tokens.shape == (3, 5, 5, 32) and views.tokens.dtype == torch.float16
    pixels = pixels_of(tiny_backbone, dataset, items)
    assert torch.equal(views.embeddings[0], tiny_backbone.image_embeddings(pixels))
    assert torch.equal(views.tokens[0], learner.prefix(pixels).half())
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(views.embeddings[one], views.embeddings[other])
        assert not torch.equal(views.tokens[one], views.tokens[other])


def test_tokens_and_embeddings_of_a_view_belong_together(tiny_backbone, dataset):
    learner = make(tiny_backbone)  # new: it says what the frozen model says
    views = embed(tiny_backbone, learner, dataset, dataset.splits["train"][:6])
    for own, tokens in zip(views.embeddings, views.tokens, strict=True):
        tuned = learner.embed_tokens(tokens)
        torch.testing.assert_close(tuned, own, rtol=0, atol=5e-3)  # tokens are in half precision


@pytest.mark.parametrize("method", ["capt", "coop"])
def test_views_are_seen_through_the_colour_map(method, tiny_backbone, dataset):
    items = dataset.splits["train"][:5]
    plain = embed(tiny_backbone, make(tiny_backbone, method), dataset, items)
    colours = ColourMap(torch.diag(torch.tensor([2.0, 0.5, 1.0])), torch.tensor([0.1, 0.0, -0.3]))
    seen = tiny_backbone.recoloured(colours)
    views = embed(tiny_backbone, make(seen, method), dataset, items)
    pixels = pixels_of(tiny_backbone, dataset, items)
    assert torch.equal(views.embeddings[0], seen.image_embeddings(pixels))
    assert not torch.allclose(views.embeddings[-1], plain.embeddings[-1], atol=0.01)


def test_without_a_visual_side_there_are_no_tokens(tiny_backbone, dataset):
    items = dataset.splits["train"][:2]
    views = embed(tiny_backbone, make(tiny_backbone, "coop"), dataset, items)
    assert views.tokens is None
    assert views.embeddings.shape == (3, 2, 32)


def test_many_images_keep_their_order(tiny_backbone, dataset, monkeypatch):
    items = dataset.splits["train"][:7]
    learner = make(tiny_backbone)
    monkeypatch.setattr("capt_train.tune.views._BATCH", 3)
    views = embed(tiny_backbone, learner, dataset, items)
    assert views.embeddings.shape[:2] == views.tokens.shape[:2] == (3, 7)
    expected = tiny_backbone.image_embeddings(pixels_of(tiny_backbone, dataset, items))
    torch.testing.assert_close(views.embeddings[0], expected, rtol=0, atol=1e-6)


class _HalfPrecision(TorchDispatchMode):
    """Notes the most memory that tensors in half precision take at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._known: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dtype == torch.float16:
            self._known.append(weakref.ref(found))
        living = [tensor for known in self._known if (tensor := known()) is not None]
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in living}
        self.peak = max(self.peak, sum(own.values()))
        return found


def test_tokens_are_in_memory_once(tiny_backbone, dataset, monkeypatch):
    items = dataset.splits["train"][:8]
    learner = make(tiny_backbone)
    monkeypatch.setattr("capt_train.tune.views._BATCH", 1)
    with _HalfPrecision() as memory:
        tokens = embed(tiny_backbone, learner, dataset, items).tokens
    assert tokens.nbytes <= memory.peak <= 1.2 * tokens.nbytes


@pytest.mark.parametrize(("limit", "told"), [(3 * 5 * 5 * 32 * 2 - 1, True), (4800, False)])
def test_much_memory_for_tokens_is_said_before_they_are_made(
    limit, told, tiny_backbone, dataset, monkeypatch, capsys
):
    monkeypatch.setattr("capt_train.tune.views._MUCH_MEMORY", limit)
    embed(tiny_backbone, make(tiny_backbone), dataset, dataset.splits["train"][:5])
    printed = capsys.readouterr().err
    assert printed.startswith("note: tokens of photos need 0.0 GiB of memory\n") == told
    assert ("note" in printed) == told


def test_the_seed_decides(tiny_backbone, dataset):
    items = dataset.splits["train"][:4]
    learner = make(tiny_backbone)
    one, same, other = (
        embed(tiny_backbone, learner, dataset, items, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one.embeddings, same.embeddings) and torch.equal(one.tokens, same.tokens)
    assert torch.equal(one.embeddings[0], other.embeddings[0])
    assert not torch.equal(one.embeddings[1], other.embeddings[1])


@pytest.mark.parametrize(("count", "trained", "held"), [(1, 1, 0), (2, 1, 1), (5, 4, 4)])
def test_the_last_of_several_views_is_held_back(count, trained, held):
    views = Views(torch.zeros(count, 2, 3), None)
    assert (views.trained, views.held) == (trained, held)


def test_one_view_is_only_the_image(tiny_backbone, dataset):
    items = dataset.splits["train"][:2]
    views = embed(tiny_backbone, make(tiny_backbone), dataset, items, views=1)
    assert len(views.embeddings) == len(views.tokens) == 1


def test_an_image_that_cannot_be_read_is_named(tiny_backbone, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "train" / name / "0.png")
    dataset = read_dataset(tmp_path)
    items = dataset.splits["train"]
    learner = make(tiny_backbone)
    gone = dataset.path(items[1])
    gone.unlink()
    with pytest.raises(ImageError, match=r"b/0\.png: no such file"):
        embed(tiny_backbone, learner, dataset, items)
    gone.write_bytes(b"no image")
    with pytest.raises(ImageError):
        embed(tiny_backbone, learner, dataset, items)


# A crop shows which pixels it has when rows and columns are written into the colours.


def ramp(count: int, size: int = 64) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    own = torch.stack([rows, columns, torch.full_like(rows, 100)], dim=-1).mul(2)
    return own.to(torch.uint8).expand(count, -1, -1, -1).contiguous()


def crops(area: float, count: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rows, columns) shown at the first and last place of each crop, in pixels."""
    found = augment(ramp(count), area, torch.Generator().manual_seed(0)).float() / 2
    rows = torch.stack([found[:, 0, 32, 0], found[:, -1, 32, 0]], dim=1)
    columns = torch.stack([found[:, 32, 0, 1], found[:, 32, -1, 1]], dim=1)
    assert (found[..., 2] == 100).all()
    return rows, columns


def test_crops_are_as_large_as_asked_for_square_inside_and_anywhere():
    rows, columns = crops(0.25)
    height = (rows[:, 1] - rows[:, 0] + 1) / 64  # share of the side
    width = ((columns[:, 1] - columns[:, 0]).abs() + 1) / 64
    torch.testing.assert_close(height, width, rtol=0, atol=0.035)
    area = height * width
    assert 0.22 < area.min() < 0.3 and 0.95 < area.max() <= 1.01
    assert 0.6 < area.mean() < 0.65  # evenly between 1/4 and 1
    # nothing beyond the border was repeated: a step to the next pixel is a step in the image
    middle_row, middle_column = rows.mean(dim=1), columns.mean(dim=1)
    for middle, side in ((middle_row, height), (middle_column, width)):
        free = 64 * (1 - side) / 2
        away = (middle - 31.5).abs()
        assert (away <= free + 1).all()
        far = side < 0.7
        assert (away[far] > 0.8 * free[far]).float().mean() > 0.1  # up to the very edge
        assert ((middle - 31.5)[far] > 0).float().mean() == pytest.approx(0.5, abs=0.1)
    moved = torch.stack([middle_row, middle_column])
    assert torch.corrcoef(moved)[0, 1].abs() < 0.15  # each way by itself


def test_half_of_the_crops_are_mirrored_left_to_right_and_none_upside_down():
    rows, columns = crops(0.6)
    assert (rows[:, 0] < rows[:, 1]).all()
    mirrored = (columns[:, 0] > columns[:, 1]).float()
    assert mirrored.mean() == pytest.approx(0.5, abs=0.08)


def test_no_pixel_from_beyond_the_border_is_made_up():
    found = augment(ramp(200), 0.3, torch.Generator().manual_seed(1)).int()
    step = found[:, 1:, :, 0] - found[:, :-1, :, 0]
    # a repeated border would be a run of equal rows longer than magnification can give (2 of 64)
    run = (step == 0).int()
    assert not (run[:, :-2] & run[:, 1:-1] & run[:, 2:]).any()


def test_a_whole_image_is_itself_or_its_mirror_image():
    pixels = torch.randint(
        0, 256, (64, 12, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    found = augment(pixels, 1.0, torch.Generator().manual_seed(0))
    same = [torch.equal(one, own) for one, own in zip(found, pixels, strict=True)]
    flipped = [torch.equal(one, own.flip(1)) for one, own in zip(found, pixels, strict=True)]
    assert all(a != b for a, b in zip(same, flipped, strict=True))
    assert 20 < sum(same) < 44


def test_augmenting_keeps_shape_and_type_and_does_not_touch_its_input():
    pixels = ramp(3, 16)[:, :, :8]
    before = pixels.clone()
    found = augment(pixels, 0.5, torch.Generator().manual_seed(0))
    assert found.shape == pixels.shape and found.dtype == torch.uint8
    assert torch.equal(pixels, before)
    assert torch.equal(found, augment(pixels, 0.5, torch.Generator().manual_seed(0)))
    assert not torch.equal(found, augment(pixels, 0.5, torch.Generator().manual_seed(1)))


def test_a_crop_is_bilinear_between_the_pixels_it_covers():
    pixels = torch.randint(
        0, 256, (6, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )
    found = augment(pixels, 0.4, torch.Generator().manual_seed(9))
    draw = torch.Generator().manual_seed(9)  # the same numbers, in the order they are drawn
    side = (0.4 + 0.6 * torch.rand(6, generator=draw)).sqrt()
    shift = (2 * torch.rand(6, 2, generator=draw) - 1) * (1 - side)[:, None]
    mirror = torch.rand(6, generator=draw) < 0.5
    for n in range(6):
        for row in range(8):
            for column in range(8):
                at = 7 - column if mirror[n] else column
                y = 4 + 4 * (side[n] * ((row + 0.5) / 4 - 1) + shift[n, 1]) - 0.5
                x = 4 + 4 * (side[n] * ((at + 0.5) / 4 - 1) + shift[n, 0]) - 0.5
                expected = bilinear(pixels[n].double(), float(y), float(x))
                assert (found[n, row, column].double() - expected).abs().max() <= 0.51


def bilinear(image: torch.Tensor, y: float, x: float) -> torch.Tensor:
    total = torch.zeros(3, dtype=torch.float64)
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            weight = (1 - abs(y - row)) * (1 - abs(x - column))
            total += weight * image[min(max(row, 0), 7), min(max(column, 0), 7)]
    return total
