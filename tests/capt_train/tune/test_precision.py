from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from capt_train.clip.backbone import Backbone
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.learner import Learner, make_learner
from capt_train.method.loss_terms import Step, loss_terms, weighted_sum
from capt_train.tune.precision import Precision
from tests.configs import train_config

CPU = torch.device("cpu")
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = dict.fromkeys(
    ("cross_entropy", "coa", "infonce", "margin", "moments", "consistency", "balance"), 1.0
)


@pytest.fixture
def learner(tiny_backbone: Backbone) -> Learner:
    config = train_config(data="", model="", method="full", prompt_depth=2)
    split = FewShotSplit(("red ball", "blue sky", "grey stone"), (0, 1, 2), (), (), {})
    zero_shot = tiny_backbone.class_embeddings(split.class_names, config.prompt.templates)
    centres = functional.normalize(torch.randn(2, 3, 5, 32, generator=generator()), dim=-1)
    return make_learner(tiny_backbone, config, split, zero_shot, centres)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_step(learner: Learner, backbone: Backbone, precision: Precision) -> Step:
    """Run both towers as a training step does."""
    pixels = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=generator(1))
    frozen = backbone.image_embeddings(pixels)
    tokens = learner.prefix(pixels)
    alpha = torch.rand(4, generator=generator(2))
    with precision.towers():
        texts = learner.texts((0, 1, 2))
        images = learner.images(tokens, alpha, shortcut=True)
    own = texts.embeddings.float()
    return Step(
        backbone.scale * torch.einsum("bd,pcd->pbc", images.embeddings, own),
        torch.tensor([0, 1, 2, 0]),
        backbone.scale,
        own,
        learner._zero_shot,
        torch.tensor([[1], [2], [0], [2]]),
        images=images.embeddings,
        frozen=frozen,
        gates=(*images.gates, *texts.gates),
    )


def test_off_leaves_float32_and_auto_does_on_a_cpu():
    for name in ("off", "auto"):
        precision = Precision(name, CPU)
        with precision.towers():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert precision.state() == {}


@pytest.mark.parametrize(("usable", "expected"), [(True, torch.bfloat16), (False, None)])
def test_auto_takes_bf16_on_gpus_that_have_it(monkeypatch, usable, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: usable)
    assert Precision("auto", torch.device("cuda"))._dtype is expected


@pytest.mark.parametrize("name", LOW)
def test_towers_run_in_the_low_precision(name):
    precision = Precision(name, CPU)
    with precision.towers():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == LOW[name]
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("name", ["off", *LOW])
def test_every_term_is_float32_and_a_step_moves_the_parameters(learner, tiny_backbone, name):
    precision = Precision(name, CPU)
    step = a_step(learner, tiny_backbone, precision)
    terms = loss_terms(step, WEIGHTS)
    assert terms.keys() == WEIGHTS.keys()
    assert all(term.dtype == torch.float32 for term in terms.values())
    exact = loss_terms(a_step(learner, tiny_backbone, Precision("off", CPU)), WEIGHTS)
    tolerance = {"off": 0.0, "bf16": 0.05, "fp16": 0.01}[name]
    for term, value in terms.items():
        torch.testing.assert_close(value, exact[term], rtol=tolerance, atol=tolerance)
    before = {key: value.clone() for key, value in learner.named_parameters()}
    frozen = {key: value.clone() for key, value in tiny_backbone.model.state_dict().items()}
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.01)
    moved: set[str] = set()
    for _ in range(1 if name != "fp16" else 20):  # fp16 looks for its scale first
        terms = loss_terms(a_step(learner, tiny_backbone, precision), WEIGHTS)
        assert precision.step(weighted_sum(terms, WEIGHTS), optimizer, [*learner.parameters()], 1.0)
        own = learner.named_parameters()
        moved |= {key for key, value in own if not torch.equal(before[key], value)}
    assert {key.split(".")[0] for key in moved} == {"prompts", "transforms", "tuner"}
    assert "tuner.parts.sample-experts.second_up" in moved
    assert "tuner.parts.adapter.blocks.0.convolution.weight" in moved
    assert all(value.dtype == torch.float32 for value in learner.parameters())
    after = tiny_backbone.model.state_dict()
    assert all(torch.equal(frozen[key], after[key]) for key in frozen)


def problem(name: str) -> tuple[Precision, nn.Parameter, torch.optim.SGD]:
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    return Precision(name, CPU), parameter, torch.optim.SGD([parameter], lr=1.0)


@pytest.mark.parametrize("name", ["off", *LOW])
@pytest.mark.parametrize(("limit", "expected"), [(1.0, [2.4, 3.2]), (0.0, [0.0, 0.0])])
def test_the_gradient_is_clipped_as_a_whole_and_only_on_request(name, limit, expected):
    precision, parameter, optimizer = problem(name)
    parameter.grad = torch.full((2,), 100.0)  # of an earlier step: to be forgotten
    assert precision.step((parameter**2).sum() / 2, optimizer, [parameter], limit)
    torch.testing.assert_close(parameter.detach(), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["off", "bf16"])
@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(name, limit, bad):
    precision, parameter, optimizer = problem(name)
    assert not precision.step((parameter * bad).sum(), optimizer, [parameter], limit)
    assert parameter.tolist() == [3.0, 4.0]
    assert precision.step(parameter.sum(), optimizer, [parameter], limit)
    assert parameter.tolist() != [3.0, 4.0]


def test_fp16_lowers_its_scale_until_the_gradient_is_finite():
    precision, parameter, optimizer = problem("fp16")
    start = precision.state()["scale"].item()

    def step() -> bool:  # 100 × the scale is too large for a half
        loss = (100 * parameter.half()).sum().float()
        return precision.step(loss, optimizer, [parameter], 1.0)

    assert step()
    assert parameter.tolist() == [3.0, 4.0]
    assert precision.state()["scale"].item() == start / 2
    for _ in range(20):
        assert step()
    assert parameter.tolist() != [3.0, 4.0]
    assert 1 < precision.state()["scale"].item() < start


def test_fp16_gives_up_where_no_scale_makes_the_gradient_finite():
    precision, parameter, optimizer = problem("fp16")
    answers = [True]
    while answers[-1] and len(answers) < 100:
        loss = (parameter * float("nan")).sum()
        answers.append(precision.step(loss, optimizer, [parameter], 1.0))
    assert not answers[-1]
    assert parameter.tolist() == [3.0, 4.0]


def test_fp16_goes_on_with_the_state_that_was_saved():
    precision, parameter, optimizer = problem("fp16")
    for bad in (True, True, False, False, False):
        factor = float("inf") if bad else 1.0
        precision.step((parameter * factor).sum(), optimizer, [parameter], 1.0)
    state = {name: value.clone() for name, value in precision.state().items()}
    assert state["scale"].item() == 65536 / 4
    other, *_ = problem("fp16")
    other.load(state)
    again: dict[str, Any] = other.state()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    assert again["_growth_tracker"].item() == 3
    other.load({})  # of a checkpoint without one
    assert other.state()["scale"].item() == 65536 / 4


def test_small_fp16_gradients_survive():
    parameter = nn.Parameter(torch.full((1, 1), 1e-4))
    for name, alive in (("fp16", True), ("unscaled", False)):
        precision = Precision("fp16", CPU)
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        parameter.grad = None
        with precision.towers():
            loss = (torch.full((1, 1), 1e-4) @ parameter).float().sum() * 1e-4
        if name == "fp16":
            precision.step(loss, optimizer, [parameter], 0.0)
        else:
            loss.backward()
        assert bool(parameter.grad.abs().sum() > 0) is alive
