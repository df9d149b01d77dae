from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from capt_deploy.core.errors import ConfigError, RunError
from capt_train.config import TrainConfig, default_losses, settings
from capt_train.methods import METHODS
from capt_train.parts import GROUPS, OWN, PARTS
from capt_train.setting_groups import TuningSettings
from tests.configs import changed

CONFIG = TrainConfig(data="photos", model="ViT-B-16")


def test_json_gives_the_same_configuration_back() -> None:
    config = changed(
        CONFIG,
        prompt_templates=("a {}.", "the {}."),
        losses_margin=0.25,
        added=("mixture",),
        without=("experts", "coa"),
        visual_consistency=4.0,
        visual_strength=0.5,
        prompt_class_specific=True,
        pretrained="openai",
        tuning_epochs=7,
    )
    stored = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(stored, RunError) == config


@pytest.mark.parametrize(
    "change",
    [
        {"colour": 1},
        {"losses": {"colour": 1.0}},
        {"losses": None},
        {"shots": 0},
        {"shots": "many"},
        {"shots": True},
        {"prompt": {**CONFIG.to_dict()["prompt"], "templates": []}},
        {"prompt": {**CONFIG.to_dict()["prompt"], "depth": 1.5}},
        {"data": 3, "colour": 1},
    ],
)
def test_json_that_does_not_fit_raises_the_error_asked_for(change: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="configuration"):
        TrainConfig.from_dict({**CONFIG.to_dict(), **change}, RunError)


@pytest.mark.parametrize("change", [{"added": [3]}, {"without": [None]}])
def test_json_lists_hold_texts(change: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="expected texts, came"):
        TrainConfig.from_dict({**CONFIG.to_dict(), **change}, RunError)


def test_json_of_another_version_is_refused_in_words() -> None:
    stored = {**CONFIG.to_dict(), "epochs": 50, "strength": "auto"}
    del stored["tuning"]
    with pytest.raises(RunError, match=r"written by another version of capt.*tune again"):
        TrainConfig.from_dict(stored, RunError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "magic"),
        ("classes", "new"),
        ("tuning_optimizer", "adam"),
        ("shots", 0),
        ("seed", -1),
        ("seed", 2**80),
        ("tuning_epochs", 0),
        ("tuning_batch_size", 0),
        ("tuning_warmup_epochs", -1),
        ("tuning_patience", -1),
        ("prompt_random_tokens", -1),
        ("tuning_learning_rate", 0.0),
        ("tuning_learning_rate", float("nan")),
        ("tuning_learning_rate", float("inf")),
        ("tuning_momentum", -0.5),
        ("tuning_momentum", 1.0),
        ("tuning_weight_decay", -0.1),
        ("tuning_weight_decay", float("nan")),
        ("prompt_templates", ()),
        ("prompt_templates", ("a photo",)),
        ("prompt_words", "  "),
        ("losses_margin", float("nan")),
        ("losses_margin", -1.0),
        ("prompt_count", 0),
        ("prompt_depth", 0),
        ("confusion_pairs", 0),
        ("confusion_momentum", 1.5),
        ("confusion_llm_timeout_s", 0.0),
        ("confusion_llm_timeout_s", float("nan")),
        ("confusion_llm_retries", -1),
        ("confusion_llm_backoff_s", -1.0),
        ("experts_centres", 0),
        ("experts_temperature", 0.0),
        ("experts_count", 0),
        ("experts_rank", 0),
        ("visual_adapter_depth", 0),
        ("visual_adapter_scale", -1.0),
        ("visual_adapter_exponent", float("nan")),
        ("visual_prompt_depth", 0),
        ("visual_prompt_tokens", 0),
        ("visual_views", 0),
        ("visual_view_area", 0.0),
        ("visual_view_area", 1.5),
        ("mixture_margin", -0.1),
        ("visual_learning_rate", 0.0),
        ("tuning_clip_norm", -1.0),
        ("visual_epochs", 0),
        ("tuning_autocast", "fp8"),
        ("visual_consistency", -1.0),
        ("visual_consistency", float("inf")),
        ("visual_patience", -1),
        ("visual_strength", 1.5),
        ("tuning_label_noise", 0.6),
        ("tuning_label_noise", -0.1),
        ("tuning_label_noise", float("nan")),
        ("tuning_label_noise", "some"),
        ("calibration_calibrator", "magic"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_what_is_expected(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^--.*: expected .*, came "):
        changed(CONFIG, **{name: value})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"tuning_epochs": 0}, "--epochs (--set tuning.epochs): expected 1 or more, came 0"),
        ({"shots": 0}, "--shots: expected all or 1 or more, came 0"),
        ({"visual_epochs": 0}, "--set visual.epochs: expected 1 or more, came 0"),
        ({"visual_strength": 2.0}, "--set visual.strength: expected auto or 0 to 1, came 2.0"),
        ({"prompt_templates": ("a",)}, "--template: expected at least one text"),
        ({"added": ("magic",)}, "--with: no part 'magic'"),
        ({"without": ("adapters",)}, "--without: no part 'adapters'; did you mean adapter?"),
        ({"added": ("coa",), "without": ("coa",)}, "--with coa: --without takes it out again"),
        ({"added": ("tcpt",), "without": ("margin", "moments")}, "--with tcpt: --without takes"),
        ({"confusion_llm_url": "http://x/v1"}, "--llm-url: expected --llm-model beside it"),
        ({"confusion_llm_model": "tiny"}, "--llm-model: expected --llm-url beside it"),
        ({"confusion_sentences": "x"}, "--sentences (--set confusion.sentences): nothing reads"),
        ({"calibration_calibrator": "vector", "classes": "base"}, "calibration.calibrator: expec"),
        (
            {f"losses_{name}": 0.0 for name in default_losses() if name != "balance"},
            "--set losses: expected at least one above 0",
        ),
    ],
)
def test_an_error_names_the_option(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        changed(CONFIG, **values)
    assert expected in str(error.value)


@pytest.mark.parametrize("warmup_epochs", [0, 2, 3, 99])
def test_warm_up_may_be_longer_than_the_tuning(warmup_epochs: int) -> None:
    config = changed(CONFIG, tuning_epochs=3, tuning_warmup_epochs=warmup_epochs)
    assert config.tuning.warmup_epochs == warmup_epochs
    assert TrainConfig.from_dict(config.to_dict(), RunError) == config


def test_empty_context_words_are_fine_for_a_random_context() -> None:
    assert changed(CONFIG, prompt_words="", prompt_random_tokens=4).prompt.random_tokens == 4


def test_every_method_makes_a_configuration() -> None:
    for name, method in METHODS.items():
        needed = {"distillation.teacher": "x"} if "distillation" in method.parts else {}
        config = CONFIG.with_settings({"method": name, **needed})
        assert config.parts == {*method.parts} <= {*PARTS}
        assert config.losses == default_losses()
    assert METHODS["full"].parts == tuple(OWN)


@pytest.mark.parametrize(
    ("shots", "epochs"), [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200), (64, 200)]
)
def test_coop_trains_as_its_authors_do_unless_told_otherwise(shots: int, epochs: int) -> None:
    config = CONFIG.with_settings({"method": "coop-paper", "shots": shots})
    assert config.parts == {"prompt"}
    assert config.loss_weights.items() >= {"cross_entropy": 1.0, "coa": 0.0, "infonce": 0.0}.items()
    tuning = {"optimizer": "sgd", "learning_rate": 0.002, "momentum": 0.9, "weight_decay": 5e-4}
    tuning |= {"epochs": epochs, "batch_size": 32, "warmup_epochs": 1, "warmup_rate": 1e-5}
    assert vars(config.tuning).items() >= {**tuning, "patience": 0, "clip_norm": 0.0}.items()
    assert config.tuning.label_noise == 0
    other = CONFIG.with_settings(
        {"tuning.epochs": 3, "method": "coop-paper", "prompt.random_tokens": 16}
    )
    assert (other.tuning.epochs, other.tuning.optimizer) == (3, "sgd")
    assert other.prompt.random_tokens == 16
    # a run that is read again, or resumed, keeps what it was begun with
    assert TrainConfig.from_dict(other.to_dict(), RunError) == other
    assert other.with_settings({"method": "coop-paper"}) == other
    assert CONFIG.with_settings({"method": "coop"}).tuning == CONFIG.tuning


def test_every_part_and_group_can_be_switched_alone() -> None:
    for name in (*OWN, *GROUPS):
        members = {*GROUPS.get(name, (name,))}
        assert members <= {*PARTS}
        assert replace(CONFIG, method="full", without=(name,)).parts == {*OWN} - members
        assert replace(CONFIG, method="zeroshot", added=(name,)).parts == members
    assert replace(CONFIG, method="zeroshot", added=("tcpt",), without=("margin",)).parts == {
        "moments"
    }


def test_only_terms_of_parts_that_are_on_have_a_weight() -> None:
    names = ("cross_entropy", "coa", "infonce", "margin", "moments", "balance")
    weights = dict(zip(names, (2.0, 3.0, 4.0, 5.0, 6.0, 7.0), strict=True))
    on = {
        "coop": {"cross_entropy", "balance"},
        "coa": {"cross_entropy", "balance", "coa"},
        "tcpt": {"cross_entropy", "balance", "margin", "moments"},
        "prompt": {"cross_entropy", "balance", "coa", "margin", "moments"},
        "capt": {"cross_entropy", "balance", "coa", "infonce"},
        "full": {*weights},
    }
    for method, terms in on.items():
        in_force = replace(CONFIG, method=method, losses=weights).loss_weights
        expected = {name: weights[name] for name in weights if name in terms}
        assert {name: weight for name, weight in in_force.items() if weight} == expected
    off = replace(CONFIG, method="coop", added=("tcpt",), without=("margin",), losses=weights)
    assert (off.loss_weights["margin"], off.loss_weights["moments"]) == (0.0, weights["moments"])


def test_what_trains_nothing_needs_no_weight() -> None:
    nothing = dict.fromkeys(default_losses(), 0.0)
    assert replace(CONFIG, method="zeroshot", losses=nothing).parts == frozenset()


def test_text_is_parsed_by_type() -> None:
    texts = {
        "tuning.epochs": "7",
        "tuning.learning_rate": "1e-3",
        "prompt.class_specific": "True",
        "prompt.words": "this is",
        "losses.moments": "0",
        "visual.consistency": "0.5",
        "visual.strength": "0.25",
        "tuning.label_noise": "auto",
        "confusion.sentences": "none",
    }
    expected = changed(
        CONFIG,
        tuning_epochs=7,
        tuning_learning_rate=1e-3,
        prompt_class_specific=True,
        prompt_words="this is",
        losses_moments=0.0,
        visual_consistency=0.5,
        visual_strength=0.25,
    )
    assert CONFIG.with_settings(texts) == expected
    back = {"visual.strength": "auto", "tuning.epochs": "50"}
    assert expected.with_settings(back).visual.strength is None
    assert CONFIG.with_settings({"tuning.epochs": "1"}).tuning == TuningSettings(epochs=1)


def test_a_method_given_as_a_setting_brings_its_parts() -> None:
    changes = {"method": "coa", "losses.coa": "0.5", "losses.margin": "9"}
    config = CONFIG.with_settings(changes)
    assert config.method == "coa"
    assert config.parts == {"prompt", "coa"}
    in_force = {name: weight for name, weight in config.loss_weights.items() if weight}
    assert in_force == {"cross_entropy": 1.0, "coa": 0.5, "balance": 0.01}
    assert config.losses["margin"] == 9.0  # kept, for the day the part is on


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tuning.epochs", "many", "tuning.epochs): expected a whole number, came 'many'"),
        ("tuning.epochs", "1.5", "tuning.epochs): expected a whole number"),
        ("visual.learning_rate", "fast", "--set visual.learning_rate: expected a number"),
        ("visual.strength", "much", "--set visual.strength: expected a number or auto"),
        ("prompt.class_specific", "1", "--set prompt.class_specific: expected true or false"),
        ("losses.margin", "", "--set losses.margin: expected a number"),
        ("losses", "1", "no setting 'losses'"),
        ("prompt.templates", "{}", "--set prompt.templates: give --template instead"),
        ("added", "coa", "--set added: give --with instead"),
        ("method", "magic", "--method: expected one of"),
        ("tuning.epoch", "3", "--set: no setting 'tuning.epoch'; did you mean tuning.epochs?"),
        ("learning_rate", "3", "no setting 'learning_rate'; did you mean tuning.learning_rate?"),
        ("momnts", "3", "no setting 'momnts'; did you mean losses.moments?"),
        ("zzz", "3", "no setting 'zzz'; see capt-train --help"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(name: str, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        CONFIG.with_settings({name: text})
    assert expected in str(error.value)


def test_every_setting_is_listed_with_its_default_as_the_command_line_takes_it() -> None:
    for name, known in settings().items():
        assert known.name == name and known.help and known.type_name
        if known.type is tuple or name in ("data", "model"):
            continue
        assert known.parse(known.default_text) == CONFIG.values()[name] == known.default
    assert settings()["visual.strength"].default_text == "auto"
    assert settings()["losses.moments"].default_text == "5.0"
