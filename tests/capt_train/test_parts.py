"""Every part can be switched off alone: it trains, exports, and loads again as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from capt_deploy.core.errors import CaptError, ConfigError
from capt_train import pipeline
from capt_train.cli.train import main
from capt_train.config import TrainConfig, default_losses
from capt_train.methods import METHODS
from capt_train.parts import GROUPS, OWN, PARTS, PUBLISHED
from capt_train.run.folder import TunedModel, load_run
from export.writer import export_run
from tests.configs import train_config

Configure = Callable[..., TrainConfig]
# Whose names appear in the learner's parameters, and whose in the history's terms.
PARAMETERS = {
    "prompt": "prompts.0.context",
    "text-prompts": "prompts.0.deeper",
    "visual-prompts": "tuner.parts.visual-prompts",
    "adapter": "tuner.parts.adapter",
    "semantic-experts": "transforms.semantic-experts.beta",
    "map": "transforms.map.matrix",
    "sample-experts": "tuner.parts.sample-experts",
}
TERMS = ("coa", "infonce", "margin", "moments")
LEARNED_FROM = (*TERMS, "retrieval", "text-prompts")


def config(**settings: Any) -> TrainConfig:
    return train_config(data="", model="", **settings)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., TunedModel]:
    """Return a function that trains into `tmp_path / "run"` and returns the model in memory."""
    kept: list[TunedModel] = []
    score = pipeline._score

    def keeping(setup: Any, model: TunedModel, *others: Any) -> Any:
        kept.append(model)
        return score(setup, model, *others)

    def trained(own: TrainConfig) -> TunedModel:
        monkeypatch.setattr(pipeline, "_score", keeping)
        pipeline.train(own, tmp_path / "run")
        return kept[-1]

    return trained


@pytest.fixture
def tiny(configure: Configure) -> Configure:
    """Return a function for configurations of runs of all parts in which κ is not 0."""

    def tiny(**settings: Any) -> TrainConfig:
        own = {
            "classes": "all",
            "method": "full",
            "tuning_epochs": 1,
            "visual_epochs": 1,
            "visual_views": 3,
        }
        own |= {"map_side": "images", "map_ridge": 0.01, "rows_weight": 0.1}  # nothing is chosen
        own |= {
            "visual_strength": "0.75",
            "prompt_depth": 2,
            "visual_prompt_depth": 2,
            "visual_prompt_tokens": 2,
        }
        return configure(**{**own, "tuning_learning_rate": 0.02, "tuning_patience": 0, **settings})

    return tiny


@pytest.mark.parametrize("part", [None, *OWN])
def test_a_run_without_one_part_trains_exports_and_loads_again(
    part: str | None,
    tiny: Configure,
    trained: Callable[..., TunedModel],
    tmp_path: Path,
) -> None:
    own = tiny(without=() if part is None else (part,))
    assert own.parts == {*OWN} - {part}
    torch.manual_seed(0)
    model = trained(own)
    names = " ".join(name for name, _ in model.learner.named_parameters())
    for other, start in PARAMETERS.items():
        gone = part == other or (part == "prompt" and other == "text-prompts")
        assert (start in names) == (not gone), other
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    text, visual = ({*stage["history"][0]} for stage in result["stages"])
    assert {*TERMS} & text == {*TERMS} - {part}
    assert {*TERMS} & visual == {*TERMS} - {part, "moments"}  # class rows are fixed there
    assert (result["mixture"]["inside"][0] == 0) == (part == "mixture")
    loaded = load_run(tmp_path / "run")
    pixels = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)
    before, after = (own.logits(own.learner.image_embeddings(pixels)) for own in (model, loaded))
    assert torch.equal(before, after)
    zero_shot = model.zero_shot_logits(model.backbone.image_embeddings(pixels))
    assert not torch.allclose(before, zero_shot, atol=1e-3)
    if part in LEARNED_FROM:  # without it, other weights go into the same graph
        return
    bundle = export_run(tmp_path / "run", tmp_path / "tiny.capt")
    report = json.loads((bundle / "report.json").read_text())
    assert report["gate"]["fp32"]["max_logit_difference"] <= 1e-4
    assert report["gate"]["fp32"]["top1_agreement"] == 1


def test_the_methods_are_made_of_parts() -> None:
    assert all(
        {*parts} <= {*PARTS} for parts in (*(m.parts for m in METHODS.values()), *GROUPS.values())
    )
    for name, method in METHODS.items():
        assert config(method=name, **_teacher(method.parts)).parts == {*method.parts}


def _teacher(parts: Iterable[str]) -> dict[str, str]:
    """Return the setting without which a part cannot be."""
    return {"distillation_teacher": "ViT-L-14"} if "distillation" in parts else {}


@pytest.mark.parametrize("name", [*PARTS, *GROUPS])
def test_a_part_or_group_is_added_and_left_out(name: str) -> None:
    own = {*GROUPS.get(name, (name,))}
    assert config(method="zeroshot", added=(name,), **_teacher(own)).parts == own
    assert config(method="full", without=(name,)).parts == {*OWN} - own


def test_a_class_has_one_prompt_and_one_row() -> None:
    for parts in (("prompt", "text-lora"), ("rows", "clap")):
        with pytest.raises(ConfigError, match=f"parts {parts[0]} and {parts[1]}: expected one"):
            config(method="zeroshot", added=parts)


def test_a_term_that_replaces_another_takes_its_weight() -> None:
    assert config(method="coop", added=("zs-norm",)).loss_weights["cross_entropy"] == 0
    assert config(method="coop").loss_weights["cross_entropy"] == 1


def test_a_teacher_is_for_distillation_alone() -> None:
    with pytest.raises(ConfigError, match="--teacher: expected a model or a run"):
        config(method="promptkd")
    with pytest.raises(ConfigError, match="--teacher: leave it out with --method coop"):
        config(method="coop", distillation_teacher="ViT-L-14")


def test_leaving_out_wins_over_adding() -> None:
    both = config(method="coop", added=("visual",), without=("experts", "coa"))
    assert both.parts == {"prompt", *GROUPS["visual"]} - {"sample-experts"}


@pytest.mark.parametrize("part", TERMS)
def test_a_loss_that_is_off_weighs_nothing_the_others_as_set(part: str) -> None:
    weights = {**default_losses(), "coa": 2.0, "infonce": 3.0, "margin": 4.0, "moments": 6.0}
    full = replace(config(method="full", without=(part,)), losses=weights)
    others = {name for other in PUBLISHED.values() for name in other.losses}
    in_force = {name: weight for name, weight in full.loss_weights.items() if name not in others}
    assert in_force == {name: weights[name] for name in in_force} | {part: 0.0}


@pytest.mark.parametrize(("name", "option"), [("added", "--with"), ("without", "--without")])
def test_a_part_that_is_not_known_is_an_error_that_names_the_option(name: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option}: no part 'hats'"):
        config(**{name: ("hats",)})


def test_the_command_line_takes_lists_and_repeated_options(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[TrainConfig] = []

    def stop(own: TrainConfig, *_: Any, **__: Any) -> None:
        taken.append(own)
        raise ConfigError("enough")

    monkeypatch.setattr(pipeline, "train", stop)
    options = ["--method", "coop", "--with", "tcpt, coa", "--with", "experts", "--with", ","]
    options += ["--without", "margin,", "--without", "sample-experts"]
    done = CliRunner().invoke(main, [*base, *options, "--out", str(tmp_path / "run")])
    assert (done.exit_code, done.stderr) == (2, "Error: enough\n")
    assert taken[0].added == ("tcpt", "coa", "experts")
    assert taken[0].without == ("margin", "sample-experts")
    assert taken[0].parts == {"prompt", "moments", "coa", "semantic-experts"}


def test_the_command_line_names_an_unknown_part(base: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [*base, "--with", "hats", "--out", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "--with: no part 'hats'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_help_describes_every_part_and_lists_every_group() -> None:
    help_text = CliRunner().invoke(main, ["--help"]).stdout
    assert max(map(len, help_text.splitlines())) <= 80
    parts, groups = help_text.partition("\nParts:\n")[2].split("\nGroups of parts:\n")

    def entries(text: str) -> dict[str, str]:
        """Return what stands beside each name; an entry goes on where a line is deeper in."""
        found = [" ".join(part.split()) for part in re.split(r"^  (?=\S)", text, flags=re.M)]
        return dict(own.split(" ", 1) for own in found if own)

    assert entries(parts) == {name: part.help for name, part in PARTS.items()}
    assert entries(groups) == {name: ", ".join(own) for name, own in GROUPS.items()}


def test_parts_of_an_interrupted_run_cannot_be_changed(
    tiny: Configure, tmp_path: Path, trained: Callable[..., TunedModel]
) -> None:
    own = {"method": "coop", "added": ("coa",)}
    trained(tiny(**own))
    with pytest.raises(CaptError, match=r"other settings: without \[\] → \['prompt'\]"):
        pipeline.train(tiny(**own, without=("prompt",)), tmp_path / "run", resume=True)
