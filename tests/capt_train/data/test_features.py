from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capt_deploy.data.datasets import Dataset, Item, read_dataset
from capt_deploy.data.preprocess import preprocess
from capt_train.clip.backbone import Backbone
from capt_train.clip.loading import load_backbone
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.data.features import embed


@pytest.fixture
def passes(tiny_backbone: Backbone) -> Iterator[list[int]]:
    """Return the sizes of the batches that the visual tower sees from now on."""
    seen: list[int] = []

    def count(_: Any, arguments: Any) -> None:
        seen.append(len(arguments[0]))

    handle = tiny_backbone.model.visual.register_forward_pre_hook(count)
    yield seen
    handle.remove()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[EmbeddingCache]:
    cache = EmbeddingCache("tiny", folder=tmp_path / "cache")
    yield cache
    cache.close()


def test_rows_are_the_images_embeddings_in_the_order_asked_for(
    tiny_backbone: Backbone, cache: EmbeddingCache, photos: Path
) -> None:
    dataset = read_dataset(photos)
    items = dataset.splits["train"][::-1] + dataset.splits["test"]
    features = embed(tiny_backbone, cache, dataset, items, "images")
    assert features.labels.tolist() == [item.label for item in items]
    assert features.embedded == len(features) == len(items)
    for row, item in zip(features.embeddings, items, strict=True):
        pixels = preprocess(dataset.path(item), tiny_backbone.preprocess)
        alone = tiny_backbone.image_embeddings(torch.from_numpy(np.stack([pixels])))[0]
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-6)


def test_a_second_time_no_image_goes_through_the_visual_tower(
    tiny_backbone: Backbone, photos: Path, tmp_path: Path, passes: list[int]
) -> None:
    dataset = read_dataset(photos)
    items = dataset.splits["train"]
    results = []
    for _ in range(2):
        cache = EmbeddingCache("tiny", folder=tmp_path)
        results.append(embed(tiny_backbone, cache, dataset, items, "images"))
        cache.close()
    assert sum(passes) == len(items)
    first, second = results
    assert second.embedded == 0
    assert torch.equal(first.embeddings, second.embeddings)
    assert torch.equal(first.labels, second.labels)


def test_the_content_of_an_image_is_its_key_not_its_path(
    tiny_backbone: Backbone, cache: EmbeddingCache, photos: Path, tmp_path: Path, passes: list[int]
) -> None:
    dataset = read_dataset(photos)
    items = dataset.splits["val"]
    before = embed(tiny_backbone, cache, dataset, items, "images")
    moved = Path(shutil.copytree(photos, tmp_path / "moved"))
    shutil.copy(moved / items[-1].path, moved / items[0].path)  # content known, place taken
    passes.clear()
    after = embed(tiny_backbone, cache, read_dataset(moved), items, "images")
    assert passes == []
    assert torch.equal(after.embeddings[0], before.embeddings[-1])
    assert torch.equal(after.embeddings[1:], before.embeddings[1:])


def test_the_same_content_twice_is_embedded_once(
    tiny_backbone: Backbone, cache: EmbeddingCache, photos: Path, tmp_path: Path, passes: list[int]
) -> None:
    for name in ("one.png", "two.png"):
        shutil.copy(photos / "train" / "red_ball" / "0.png", tmp_path / name)
    dataset = Dataset(tmp_path, ("a", "b"), {})
    features = embed(
        tiny_backbone, cache, dataset, [Item("one.png", 0), Item("two.png", 1)], "images"
    )
    assert passes == [1]
    assert torch.equal(features.embeddings[0], features.embeddings[1])
    assert features.labels.tolist() == [0, 1]


def test_unreadable_and_missing_images_are_dropped_and_listed(
    tiny_backbone: Backbone, cache: EmbeddingCache, photos: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    items = read_dataset(own).splits["test"]
    (own / items[2].path).write_bytes(b"no image")
    (own / items[5].path).unlink()
    content = (own / items[9].path).read_bytes()
    (own / items[9].path).write_bytes(content[: len(content) // 2])
    features = embed(tiny_backbone, cache, Dataset(own, ("a",) * 4, {}), items, "images")
    bad = (2, 5, 9)
    assert [skipped.path for skipped in features.skipped] == [items[i].path for i in bad]
    assert all(skipped.reason for skipped in features.skipped)
    expected = [item.label for index, item in enumerate(items) if index not in bad]
    assert features.labels.tolist() == expected
    assert len(features.embeddings) == len(expected)


def test_many_images_are_embedded_in_several_batches(
    tiny_backbone: Backbone, cache: EmbeddingCache, tmp_path: Path, passes: list[int]
) -> None:
    from PIL import Image

    items = []
    for number in range(150):
        Image.new("L", (4, 4), number).save(tmp_path / f"{number}.png")
        items.append(Item(f"{number}.png", number % 3))
    features = embed(tiny_backbone, cache, Dataset(tmp_path, ("a", "b", "c"), {}), items, "images")
    assert sum(passes) == 150
    assert max(passes) < 150
    assert features.labels.tolist() == [item.label for item in items]


def test_no_images_give_an_empty_matrix_of_the_models_dimension(
    tiny_backbone: Backbone, cache: EmbeddingCache, photos: Path
) -> None:
    features = embed(tiny_backbone, cache, read_dataset(photos), [], "images")
    assert features.embeddings.shape == (0, 32)
    assert features.sha256 == ()
    assert len(features) == 0


def test_sha256_are_the_content_hashes_of_the_rows_that_are_kept(
    tiny_backbone: Backbone, cache: EmbeddingCache, photos: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    items = read_dataset(own).splits["test"]
    shutil.copy(own / items[7].path, own / items[4].path)  # the same content twice
    (own / items[2].path).write_bytes(b"no image")
    (own / items[5].path).unlink()
    contents = [(own / item.path).read_bytes() for i, item in enumerate(items) if i not in (2, 5)]
    expected = tuple(hashlib.sha256(content).hexdigest() for content in contents)
    dataset = Dataset(own, ("a",) * 4, {})
    for fresh in (len(expected) - 1, 0):  # then all from the cache
        features = embed(tiny_backbone, cache, dataset, items, "images")
        assert features.embedded == fresh
        assert features.sha256 == expected
        assert len(features) == len(expected)


def test_real_photos_give_open_clips_own_embeddings(shared: Path, cache: EmbeddingCache) -> None:
    import open_clip
    from PIL import Image

    name = f"local-dir:{shared / 'models' / 'tinyclip-cifar'}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model = model.eval()
    dataset = read_dataset(shared / "data" / "cifar100")
    items = dataset.splits["val"][::50]
    features = embed(load_backbone(name, None, torch.device("cpu")), cache, dataset, items, "some")
    pixels = torch.stack([transform(Image.open(dataset.path(item))) for item in items])
    with torch.no_grad():
        expected = model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(features.embeddings, expected, rtol=0, atol=1e-5)
