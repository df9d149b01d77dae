"""What a configuration of capt-compare asks for, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capt_deploy.core.errors import ConfigError, DataError
from capt_train.compare.catalogue import DATASETS
from capt_train.compare.plan import Plan, read_plan
from capt_train.settings import CLIP_TEMPLATES

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a configuration with some keys changed."""

    def write(**changes: Any) -> Path:
        content = {
            "model": "local-dir:models/tiny",
            "data": {"pets": "photos"},
            "methods": ["zeroshot", {"name": "CoOp", "method": "coop-paper"}],
            "shots": [4, 1],
            "seeds": [1, 2],
            **changes,
        }
        path = tmp_path / "papers.json"
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        return path

    return write


def keys(plan: Plan) -> list[str]:
    return [cell.key for cell in plan.cells]


def test_cells_are_methods_times_shots_times_seeds(write: Write, tmp_path: Path) -> None:
    plan = read_plan(write())
    assert keys(plan) == [
        f"pets / {row} / {shots} / {seed}"
        for seed in (1, 2)
        for shots in (4, 1)
        for row in ("zeroshot", "CoOp")
    ]
    config = plan.cells[1].config
    assert config.data == str(tmp_path / "photos")
    assert config.model == f"local-dir:{tmp_path / 'models' / 'tiny'}"
    assert (config.method, config.shots, config.tuning.epochs) == ("coop-paper", 4, 100)
    assert (plan.calibrations, plan.reference, plan.processes) == (("none", "chosen"), None, 1)


def test_seeds_may_differ_between_shots(write: Write) -> None:
    plan = read_plan(write(methods=["zeroshot"], seeds={"4": [1, 2, 3], "1": [7]}))
    draws = [(cell.config.shots, cell.config.seed) for cell in plan.cells]
    assert draws == [(4, 1), (1, 7), (4, 2), (4, 3)]


def test_a_method_may_have_data_sets_and_seeds_of_its_own(write: Write) -> None:
    methods = ["zeroshot", {"method": "cocoop", "data": ["pets"], "seeds": [1]}]
    plan = read_plan(write(methods=methods, data={"pets": "a", "cars": "b"}, shots=[4]))
    assert [key for key in keys(plan) if "cocoop" in key] == ["pets / cocoop / 4 / 1"]


def test_a_variant_adds_parts_where_something_is_trained(write: Write) -> None:
    methods = [
        "zeroshot",
        "class-means",
        "clap",
        {"method": "coop", "settings": {"tuning.epochs": 3}},
    ]
    plan = read_plan(
        write(variants={"": [], "+ TCPT": ["tcpt"]}, methods=methods, shots=[4], seeds=[1])
    )
    assert [cell.row for cell in plan.cells] == [
        *("zeroshot", "class-means", "clap", "clap + TCPT", "coop", "coop + TCPT")
    ]
    assert {"margin", "moments"} <= plan.cells[3].config.parts
    assert plan.cells[4].config.tuning.epochs == 3
    assert plan.skipped == tuple(
        f"{name} + TCPT: nothing is trained by a loss; left out"
        for name in ("zeroshot", "class-means")
    )


def test_settings_of_all_of_a_data_set_and_of_a_method_are_taken_in_this_order(
    write: Write,
) -> None:
    plan = read_plan(
        write(
            settings={"tuning.epochs": 2, "tuning.batch_size": 7, "losses.margin": 1.0},
            data={"pets": {"path": "a", "classes": "base", "settings": {"tuning.epochs": 3}}},
            methods=[{"method": "coop", "settings": {"tuning.batch_size": 8}}],
        )
    )
    config = plan.cells[0].config
    assert (config.tuning.epochs, config.tuning.batch_size, config.classes) == (3, 8, "base")
    assert config.losses["margin"] == 1.0


def test_the_prompt_of_a_data_set_is_that_of_the_field_unless_the_method_has_many(
    write: Write, tmp_path: Path
) -> None:
    for name in DATASETS["dtd"].needed:
        (tmp_path / "dtd" / name).mkdir(parents=True)
    plan = read_plan(write(data=["dtd"], methods=["coop", "promptsrc"], root=".", shots=[1]))
    assert plan.cells[0].config.data == str(tmp_path / "dtd")
    templates = [cell.config.prompt.templates for cell in plan.cells[:2]]
    assert templates == [("{} texture.",), (CLIP_TEMPLATES,)]


def test_a_data_set_that_is_missing_says_what_to_get(write: Write, tmp_path: Path) -> None:
    (tmp_path / "eurosat" / "2750").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"expected split_zhou_EuroSAT\.json; get the photos from https"
    ):
        read_plan(write(data=["eurosat"]))


def test_targets_are_measured_with_every_run(write: Write, tmp_path: Path) -> None:
    plan = read_plan(write(targets={"sketch": "other"}))
    assert plan.cells[0].targets == {"sketch": (str(tmp_path / "other"), None)}


def test_a_teacher_beside_the_configuration_is_found(write: Write, tmp_path: Path) -> None:
    (tmp_path / "runs" / "big").mkdir(parents=True)
    method = {"method": "promptkd", "settings": {"distillation.teacher": "runs/big"}}
    plan = read_plan(write(methods=[method]))
    assert plan.cells[0].config.distillation.teacher == str(tmp_path / "runs" / "big")


def test_the_fingerprint_knows_what_decides_a_result(write: Write) -> None:
    first = read_plan(write()).cells[1]
    assert read_plan(write(processes=2, devices=["cpu"])).cells[1].fingerprint == first.fingerprint
    elsewhere = {"data": {"pets": "far/away/photos"}, "model": "local-dir:other/tiny"}
    assert read_plan(write(**elsewhere)).cells[1].fingerprint == first.fingerprint
    for changes in ({"settings": {"tuning.epochs": 9}}, {"model": "x"}, {"targets": {"a": "b"}}):
        assert read_plan(write(**changes)).cells[1].fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shot": [1]}, "shot: no such key; did you mean shots"),
        ({"data": {}}, "data: expected at least one"),
        ({"data": {"pets": {"path": "a", "modle": "x"}}}, "data.pets.modle: no such key"),
        ({"data": ["pets"]}, "pets: expected a path; known without one: imagenet"),
        ({"model": None}, "data.pets: expected a model"),
        ({"methods": ["copo"]}, "methods: no method 'copo'; did you mean coop"),
        ({"methods": [{"name": "x"}]}, "methods: no method ''"),
        ({"methods": ["coop", {"name": "coop", "method": "map"}]}, "two have the same name"),
        ({"methods": [{"method": "coop", "settings": {"epochs": 1}}]}, "no setting 'epochs'"),
        ({"calibrations": ["platt"]}, "calibrations: no 'platt'"),
        ({"seeds": {"4": [1]}}, "seeds: expected a list for each of the shots"),
        ({"reference": "KgCoOp"}, "reference: no row 'KgCoOp'"),
        ({"variants": ["tcpt"]}, "variants: expected an object"),
        ({"variants": {"+": "tcpt"}}, r"variants.\+: expected a list of parts"),
        ({"variants": {"+": ["tcp"]}}, r"variants.\+: no part 'tcp'; did you mean tcpt"),
        ({"shots": 16}, "shots: expected a list, came 16"),
        ({"shots": ["x"]}, "expected whole numbers"),
        ({"seeds": 3}, "seeds: expected a list or an object"),
        ({"settings": []}, "settings: expected an object"),
        ({"processes": 0}, "processes: expected 1 or more"),
        ({"devices": "cuda:0"}, "devices: expected a list"),
        ({"targets": {"pets": {"path": "x"}}}, "pets: expected a path"),
        ({"methods": [{"method": "coop", "data": ["cats"]}]}, "methods.data: no data set 'cats'"),
        ({"methods": [{"method": "coop", "data": "pets"}]}, "methods.data: expected a list"),
    ],
)
def test_a_mistake_is_named_with_the_file(
    write: Write, changes: dict[str, Any], message: str
) -> None:
    path = write(**changes)
    with pytest.raises(ConfigError, match=message) as caught:
        read_plan(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_every_data_set_of_the_field_is_known() -> None:
    assert len(DATASETS) == 11 + 4
    assert all("{}" in dataset.template for dataset in DATASETS.values())
