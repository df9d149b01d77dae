from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from capt_train.clip.backbone import Backbone
from capt_train.clip.colour_map import ColourMap

MATRIX = [[1.5, -0.3, 0.1], [0.2, 0.7, -0.4], [-0.6, 0.05, 1.1]]
OFFSET = [0.3, -0.2, 0.05]
MAP = ColourMap(torch.tensor(MATRIX), torch.tensor(OFFSET))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_every_pixel_is_mapped_by_itself() -> None:
    images = noise(2, 3, 4, 5)
    found = MAP(images)
    assert found.shape == images.shape
    for n in range(2):
        for row in range(4):
            for column in range(5):
                pixel = images[n, :, row, column].tolist()
                for channel in range(3):
                    mixed = sum(a * x for a, x in zip(MATRIX[channel], pixel, strict=True))
                    value = float(found[n, channel, row, column])
                    assert value == pytest.approx(mixed + OFFSET[channel], abs=1e-5)


def test_a_backbone_with_a_map_sees_other_colours_and_the_one_it_came_from_does_not(
    tiny_backbone: Backbone,
) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=generator)
    before = tiny_backbone.image_embeddings(pixels)
    mapped = tiny_backbone.recoloured(MAP)
    seen = MAP(tiny_backbone.normalise(pixels))
    with torch.no_grad():
        expected = tiny_backbone.model.encode_image(seen, normalize=True)
    torch.testing.assert_close(mapped.image_embeddings(pixels), expected)
    assert not torch.allclose(expected, before, atol=0.01)
    assert torch.equal(tiny_backbone.image_embeddings(pixels), before)
    assert torch.equal(mapped.recoloured(None).image_embeddings(pixels), before)
    assert mapped.model is tiny_backbone.model


def test_its_size_is_twelve_numbers() -> None:
    assert MAP.size == 12


def test_json_keeps_every_bit() -> None:
    own = ColourMap(noise(3, 3) * torch.tensor([1e-30, 1.0, 1e30]), noise(3) / 3)
    read = ColourMap.from_dict(json.loads(json.dumps(own.to_dict())))
    assert torch.equal(read.matrix, own.matrix) and torch.equal(read.offset, own.offset)
    assert read.matrix.dtype == read.offset.dtype == torch.float32
    whole = ColourMap.from_dict({"matrix": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "offset": [0, 0, 0]})
    assert torch.equal(whole.matrix, torch.eye(3)) and whole.offset.dtype == torch.float32


GOOD: dict[str, Any] = {"matrix": MATRIX, "offset": OFFSET}
BAD: dict[str, Any] = {
    "nothing": {},
    "a list": [],
    "no matrix": {"offset": OFFSET},
    "no offset": {"matrix": MATRIX},
    "a row too few": {**GOOD, "matrix": MATRIX[:2]},
    "rows of four": {**GOOD, "matrix": [[*row, 0.0] for row in MATRIX]},
    "ragged rows": {**GOOD, "matrix": [*MATRIX[:2], [1.0]]},
    "an offset too many": {**GOOD, "offset": [*OFFSET, 0.0]},
    "one number as offset": {**GOOD, "offset": 0.0},
    "not a number": {**GOOD, "offset": [0.0, float("nan"), 0.0]},
    "infinite": {**GOOD, "matrix": [*MATRIX[:2], [float("inf"), 0.0, 1.0]]},
    "infinite in float32": {**GOOD, "offset": [0.0, 1e300, 0.0]},
    "null": {**GOOD, "matrix": [*MATRIX[:2], [None, 0.0, 1.0]]},
    "no offset but null": {**GOOD, "offset": None},
    "an object": {**GOOD, "matrix": {}},
    "text": {**GOOD, "offset": ["0", "0", "0"]},
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_map_is_refused(case: str) -> None:
    ColourMap.from_dict(GOOD)
    with pytest.raises((TypeError, KeyError, ValueError)):
        ColourMap.from_dict(BAD[case])
