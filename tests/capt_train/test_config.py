from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from capt_deploy.core.errors import ConfigError, RunError
from capt_train.config import LossWeights, TrainConfig
from capt_train.parts import GROUPS, METHODS, PARTS

CONFIG = TrainConfig(data="photos", model="ViT-B-16")


def test_json_gives_the_same_configuration_back() -> None:
    config = replace(
        CONFIG,
        templates=("a {}.", "the {}."),
        weights=LossWeights(margin=0.25),
        added=("mixture",),
        without=("experts", "coa"),
        consistency=4.0,
        far_epochs=0,
        class_specific=True,
        pretrained="openai",
        epochs=7,
    )
    stored = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(stored, RunError) == config


@pytest.mark.parametrize(
    "change",
    [
        {"colour": 1},
        {"weights": {"colour": 1.0}},
        {"weights": None},
        {"shots": 0},
        {"shots": "many"},
        {"templates": []},
        {"data": 3, "colour": 1},
    ],
)
def test_json_that_does_not_fit_raises_the_error_asked_for(change: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="configuration"):
        TrainConfig.from_dict({**CONFIG.to_dict(), **change}, RunError)


def test_json_of_before_there_was_label_noise_is_read() -> None:
    stored = CONFIG.to_dict()
    del stored["label_noise"]
    assert TrainConfig.from_dict(stored, RunError) == CONFIG


def test_label_noise_is_found_or_given() -> None:
    assert CONFIG.fixed_label_noise is None
    assert CONFIG.with_settings({"label_noise": "0.25"}).fixed_label_noise == 0.25


def test_json_without_weights_is_refused() -> None:
    stored = CONFIG.to_dict()
    del stored["weights"]
    with pytest.raises(RunError, match="weights"):
        TrainConfig.from_dict(stored, RunError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "magic"),
        ("classes", "new"),
        ("optimizer", "adam"),
        ("shots", 0),
        ("seed", -1),
        ("seed", 2**80),
        ("epochs", 0),
        ("batch_size", 0),
        ("warmup_epochs", -1),
        ("patience", -1),
        ("context_tokens", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("momentum", -0.5),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("weight_decay", float("nan")),
        ("templates", ()),
        ("templates", ("a photo",)),
        ("context_init", "  "),
        ("weights", LossWeights(margin=float("nan"))),
        ("weights", LossWeights(margin=-1.0)),
        ("weights", LossWeights(**dict.fromkeys(asdict(LossWeights()), 0.0))),
        ("weights", LossWeights(0.0, 0.0, 0.0, 0.0, 0.0, balance=1.0)),
        ("added", ("magic",)),
        ("without", ("adapters",)),
        ("prompts", 0),
        ("text_depth", 0),
        ("mined_pairs", 0),
        ("bank_momentum", 1.5),
        ("llm_url", "http://localhost/v1"),
        ("centres", 0),
        ("centre_temperature", 0.0),
        ("experts", 0),
        ("expert_rank", 0),
        ("adapter_blocks", 0),
        ("adapter_scale", -1.0),
        ("adapter_exponent", float("nan")),
        ("visual_depth", 0),
        ("visual_tokens", 0),
        ("views", 0),
        ("view_area", 0.0),
        ("view_area", 1.5),
        ("mixture_margin", -0.1),
        ("visual_learning_rate", 0.0),
        ("text_rate_beside_visual", 1.5),
        ("clip_norm", -1.0),
        ("visual_epochs", 0),
        ("autocast", "fp8"),
        ("consistency", -1.0),
        ("far_consistency", float("inf")),
        ("far_epochs", -1),
        ("far_patience", -1),
        ("label_noise", "0.6"),
        ("label_noise", "-0.1"),
        ("label_noise", "nan"),
        ("label_noise", "some"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_what_is_expected(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: expected .*, came "):
        replace(CONFIG, **{name: value})


@pytest.mark.parametrize("warmup_epochs", [0, 2, 3, 99])
def test_warm_up_may_be_longer_than_the_tuning(warmup_epochs: int) -> None:
    config = replace(CONFIG, epochs=3, warmup_epochs=warmup_epochs)
    assert config.warmup_epochs == warmup_epochs
    assert TrainConfig.from_dict(config.to_dict(), RunError).warmup_epochs == warmup_epochs


def test_one_epoch_needs_no_other_setting() -> None:
    assert CONFIG.with_settings({"epochs": "1"}) == replace(CONFIG, epochs=1)


def test_empty_context_words_are_fine_for_a_random_context() -> None:
    assert replace(CONFIG, context_init="", context_tokens=4).context_tokens == 4


def test_every_method_makes_a_configuration() -> None:
    for method, parts in METHODS.items():
        config = replace(CONFIG, method=method)
        assert config.parts == {*parts} <= {*PARTS}
        assert config.weights == LossWeights()
    assert METHODS["full"] == tuple(PARTS)


def test_every_part_and_group_can_be_switched_alone() -> None:
    for name in (*PARTS, *GROUPS):
        own = {*GROUPS.get(name, (name,))}
        assert own <= {*PARTS}
        assert replace(CONFIG, method="full", without=(name,)).parts == {*PARTS} - own
        assert replace(CONFIG, method="zeroshot", added=(name,)).parts == own
        assert replace(CONFIG, added=(name,), without=(name,)).parts == CONFIG.parts - own


def test_only_terms_of_parts_that_are_on_have_a_weight() -> None:
    weights = LossWeights(2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    on = {
        "coop": {"cross_entropy", "balance"},
        "coa": {"cross_entropy", "balance", "coa"},
        "tcpt": {"cross_entropy", "balance", "margin", "moments"},
        "prompt": {"cross_entropy", "balance", "coa", "margin", "moments"},
        "capt": {"cross_entropy", "balance", "infonce"},
        "full": {*asdict(weights)},
    }
    for method, names in on.items():
        in_force = asdict(replace(CONFIG, method=method, weights=weights).loss_weights)
        expected = {name: own if name in names else 0.0 for name, own in asdict(weights).items()}
        assert in_force == expected
    off = replace(CONFIG, method="coop", added=("tcpt",), without=("margin",), weights=weights)
    assert (off.loss_weights.margin, off.loss_weights.moments) == (0.0, weights.moments)


def test_what_trains_nothing_needs_no_weight() -> None:
    nothing = LossWeights(**dict.fromkeys(asdict(LossWeights()), 0.0))
    assert replace(CONFIG, method="zeroshot", weights=nothing).parts == frozenset()


def test_settings_are_parsed_by_type_and_loss_weights_by_their_names() -> None:
    changed = CONFIG.with_settings(
        {
            "epochs": "7",
            "learning_rate": "1e-3",
            "class_specific": "True",
            "context_init": "this is",
            "moments": "0",
            "far_consistency": "0.5",
        }
    )
    expected = replace(
        CONFIG,
        epochs=7,
        learning_rate=1e-3,
        class_specific=True,
        context_init="this is",
        weights=replace(CONFIG.weights, moments=0.0),
        far_consistency=0.5,
    )
    assert changed == expected


def test_a_method_given_as_a_setting_brings_its_parts() -> None:
    changed = CONFIG.with_settings({"method": "coa", "coa": "0.5", "margin": "9"})
    assert changed.method == "coa"
    assert changed.parts == {"prompt", "coa"}
    expected = LossWeights(coa=0.5, infonce=0.0, margin=0.0, moments=0.0)
    assert changed.loss_weights == expected
    assert changed.weights.margin == 9.0  # kept, for the day the part is on


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("epochs", "many", "epochs: expected int, came 'many'"),
        ("epochs", "1.5", "epochs: expected int"),
        ("learning_rate", "fast", "learning_rate: expected float"),
        ("class_specific", "1", "class_specific: expected true or false"),
        ("margin", "", "margin: expected float"),
        ("weights", "1", "no setting 'weights'"),
        ("templates", "{}", "no setting 'templates'"),
        ("epochs", "0", "epochs: expected at least 1"),
        ("method", "magic", "method: expected one of"),
        ("added", "coa", "no setting 'added'"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(name: str, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        CONFIG.with_settings({name: text})


def test_an_unknown_setting_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'epoch'.*margin.*epochs"):
        CONFIG.with_settings({"epoch": "3"})
