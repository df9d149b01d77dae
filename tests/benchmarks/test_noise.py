"""What is put wrong is what is said, nothing else; and cells are kept."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import cell, noise, record
from benchmarks.cell import World
from benchmarks.noise import Trouble
from capt_deploy.data.datasets import Item, read_dataset
from capt_train.clip.loading import load_backbone
from capt_train.config import TrainConfig
from capt_train.data.fewshot import choose
from tests.conftest import PER_CLASS

OTHERS = [[1, 2], [0, 2], [0, 1]] * 10
LABELS = [0, 1, 2] * 10
MEASURED = {key: 0.5 for _, key, _ in noise.COLUMNS}


@pytest.fixture
def place(photos: Path, tiny_model_dir: Path) -> World:
    return World(str(photos), f"local-dir:{tiny_model_dir}")


def labels_of(path: str | Path, split: str) -> dict[str, int]:
    return {item.path: item.label for item in read_dataset(path).splits[split]}


@pytest.mark.parametrize(("share", "wrong"), [(0.0, 0), (0.1, 3), (0.25, 8), (1.0, 30)])
def test_as_many_labels_become_wrong_as_are_wanted(share: float, wrong: int) -> None:
    made = noise.wrong_labels(LABELS, OTHERS, share, "a")
    assert sum(was != now for was, now in zip(LABELS, made, strict=True)) == wrong
    assert all(now in (was, *wrong) for was, now, wrong in zip(LABELS, made, OTHERS, strict=True))


def test_the_seed_alone_decides_which_labels_become_wrong() -> None:
    first = noise.wrong_labels(LABELS, OTHERS, 0.3, "a")
    assert noise.wrong_labels(LABELS, OTHERS, 0.3, "a") == first
    assert noise.wrong_labels(LABELS, OTHERS, 0.3, "b") != first


def test_sizes_of_a_long_tail_shrink_by_one_factor() -> None:
    assert noise.long_tail(4, 27) == [27, 9, 3, 1]
    assert noise.long_tail(1, 9) == [9]
    assert noise.long_tail(3, 1) == [1, 1, 1]


def test_the_first_images_of_each_class_stay() -> None:
    items = [Item("a", 0), Item("b", 1), Item("c", 0), Item("d", 1), Item("e", 0)]
    kept = noise.shortened(items, {0: 2, 1: 1})
    assert [item.path for item in kept] == ["a", "b", "c"]


def test_the_likeliest_other_class_is_the_frozen_models(place: World, photos: Path) -> None:
    dataset, classes = read_dataset(photos), (0, 2, 3)
    items = [item for item in dataset.splits["train"] if item.label in classes]
    backbone = load_backbone(place.model, None, torch.device("cpu"))
    names = [f"a photo of a {dataset.class_names[index]}." for index in classes]
    texts = backbone.text_embeddings(names)
    pixels = noise.embed(backbone, None, dataset, items, "images").embeddings
    for item, scores, found in zip(
        items,
        (pixels @ texts.T).tolist(),
        noise.likeliest_others(place, dataset, items, classes),
        strict=True,
    ):
        wrong = {
            label: score
            for label, score in zip(classes, scores, strict=True)
            if label != item.label
        }
        assert found == [max(wrong, key=lambda label: wrong[label])]


@pytest.mark.parametrize("kind", ["uniform", "pair"])
@pytest.mark.parametrize("val_too", [True, False])
def test_labels_are_wrong_where_they_shall_be_and_images_are_the_same(
    place: World, photos: Path, kind: str, val_too: bool
) -> None:
    trouble = Trouble(kind, 0.5, val_too)
    right = choose(read_dataset(photos), "base", noise.SHOTS, seed=3)
    with noise.troubled(place, trouble, seed=3) as data:
        assert read_dataset(data).class_names == right.class_names
        for split, own, share in (
            ("train", right.train, 0.5),
            ("val", right.val, 0.5 * val_too),
        ):
            truth = {f"images/{item.path}": item.label for item in own}
            made = labels_of(data, split)
            assert made.keys() == truth.keys()
            wrong = [path for path in made if made[path] != truth[path]]
            assert len(wrong) == share * len(truth)
            assert {*made.values()} <= {*right.tuned}
        truth = labels_of(photos, "test")
        assert labels_of(data, "test") == {f"images/{path}": truth[path] for path in truth}
        assert (Path(data).parent / next(iter(made))).is_file()


def test_a_tail_has_its_sizes_and_its_small_classes_are_listed(place: World) -> None:
    with noise.troubled(place, Trouble(sizes="tail"), seed=1) as data:
        sizes = Counter(labels_of(data, "train").values())
        (large, most), (small, least) = sizes.most_common()
        assert (most, least) == (PER_CLASS["train"], 1)
        val = Counter(labels_of(data, "val").values())
        assert (val[large], val[small]) == (3, 1)
        listed = Path(data).with_name("small.csv").read_text().splitlines()
        own = read_dataset(data).class_names[small]
        assert len(listed) == 1 + 5 and all(f",{own},test" in line for line in listed[1:])


def test_level_classes_have_as_many_images_as_those_of_a_tail(place: World) -> None:
    with noise.troubled(place, Trouble(sizes="level"), seed=1) as data:
        train, val = (Counter(labels_of(data, split).values()) for split in ("train", "val"))
    assert {*train.values()} == {round((PER_CLASS["train"] + 1) / 2)}
    assert {*val.values()} == {2}


def test_what_is_listed_is_tuned_on(place: World, tmp_path: Path) -> None:
    with noise.troubled(place, Trouble("uniform", 0.5), seed=1) as data:
        config = TrainConfig(data, place.model, method="coop", classes="base", shots=1000)
        small = str(Path(data).with_name("small.csv"))
        figures = cell.measure(replace(config, epochs=1, text_depth=2), "test", {"small": small})
    assert {*MEASURED} <= {*figures}
    assert figures["small"] in {number / 5 for number in range(6)}


def test_a_table_has_a_line_for_each_trouble_that_is_measured() -> None:
    own = {"method": "CoOp", "trouble": "none", **MEASURED}
    without = {key: value for key, value in MEASURED.items() if key != "small"}
    wrong = {"method": "CoOp", "trouble": "pair 20 %", **without, "nll_base": 1.23456}
    lines = noise.markdown({"a": own, "b": wrong, "c": {**wrong, "nll_base": 1.0}}).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| CoOp | none | 50.0 (1) | ")
    assert "| - |" in lines[3] and "| 1.117 |" in lines[3]


def test_cells_are_kept_and_written_into_the_docs(
    place: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, dict[str, str]]] = []

    def measure(config: TrainConfig, split: str, also: dict[str, str]) -> dict[str, Any]:
        assert split == "test" and Path(config.data).is_file()
        asked.append((config.method, also))
        return MEASURED

    docs = tmp_path / "confidence.md"
    docs.write_text("before\n<!-- noise -->\n<!-- end of noise -->\nafter\n")
    monkeypatch.setattr(noise, "DOCS", docs)
    monkeypatch.setattr(noise, "measure", measure)
    monkeypatch.setattr(noise, "open_world", lambda name: _Opened(place))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    options = ["--world", "here", "--seeds", "1,2", "--methods", "CoOp"]
    for _ in range(2):
        done = CliRunner().invoke(
            noise.main, [*options, "--troubles", "none|uniform 20 %", "--docs"]
        )
        assert done.exit_code == 0, done.output
    assert [(method, {*also}) for method, also in asked] == [
        ("coop", {"small"}),
        ("coop", set()),
    ] * 2
    assert len(json.loads((tmp_path / "noise-here.json").read_text())["cells"]) == 4
    assert "| CoOp | uniform 20 % | 50.0 ± 0.0 (2) |" in docs.read_text()


def test_the_docs_show_what_was_measured() -> None:
    cells = record.load_cells(f"{noise.NAME}-cifar100")
    assert cells and noise.markdown(cells) in noise.DOCS.read_text()


def test_an_unknown_row_is_refused() -> None:
    done = CliRunner().invoke(noise.main, ["--world", "pictograms", "--troubles", "bad luck"])
    assert done.exit_code and "bad luck" in done.output


class _Opened:
    """A world that is there already."""

    def __init__(self, place: World) -> None:
        self._place = place

    def __enter__(self) -> World:
        return self._place

    def __exit__(self, *_: object) -> None:
        pass


def test_no_cell_is_of_other_settings_than_now() -> None:
    for one in record.load_cells(f"{noise.NAME}-cifar100").values():
        config = noise.config_of(World("anywhere", "any"), one["method"], one["seed"])
        assert cell.settings_of(config) == one["settings"]
