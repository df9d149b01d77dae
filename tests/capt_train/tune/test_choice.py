"""Held-out photos decide: every photo is judged by a tuning that has not seen it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from capt_deploy.evaluation.summary import choice_notes, choice_rows, curve_notes
from capt_train.data.features import Features
from capt_train.method.class_rows import UNCHANGED, UNJUDGED_WEIGHT, discriminant
from capt_train.method.learner import Learner
from capt_train.tune import candidates as candidates_module
from capt_train.tune import choice as choice_module
from capt_train.tune import fit_map
from capt_train.tune import folds as folds_module
from capt_train.tune.candidates import Candidate, candidates, choosable
from capt_train.tune.choice import Choice, choose
from capt_train.tune.folds import Fold
from capt_train.tune.judging import Judgement, is_ahead
from capt_train.tune.stages import TuningTask, zero_shot_bank
from tests.configs import train_config

DIM, SCALE = 12, 20.0


@pytest.fixture(autouse=True)
def _few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_map, "RIDGES", (0.1, 0.01))
    monkeypatch.setattr(candidates_module, "WEIGHTS", (0.1, 1.0))


def world(
    counts: list[int],
    val: int = 0,
    knows: float = 0.3,
    seed: int = 0,
    blur: float = 0.25,
    **settings: object,
) -> TuningTask:
    """Return photos of classes whose names know little of them (`knows`: 0 nothing, 1 all)."""
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    classes = len(counts)
    centres = functional.normalize(noise(classes, DIM), dim=1)
    mixed = knows * centres + (1 - knows) * functional.normalize(noise(classes, DIM), dim=1)
    texts = functional.normalize(mixed, dim=1)

    def photos(number: list[int]) -> Features:
        labels = torch.cat([torch.full((n,), label) for label, n in enumerate(number)])
        images = functional.normalize(centres[labels] + blur * noise(len(labels), DIM), dim=1)
        return Features(images, labels)

    tuned, train = tuple(range(classes)), photos(counts)
    config = train_config(method="capt", **{"without": ("prompt", "colours"), **settings})
    bank = zero_shot_bank(SCALE, train, tuned, texts)
    return TuningTask(SCALE, tuned, train, photos([val] * classes), texts, config, bank)


def make(tuned: tuple[int, ...]) -> Learner:
    raise AssertionError("nothing is trained by epochs")


def decide(task: TuningTask, *, new_classes: bool = False) -> Choice:
    names = [f"class {label}" for label in task.tuned]
    return choose(task, make, names, new_classes=new_classes)


def test_names_that_know_nothing_get_rows() -> None:
    choice = decide(world([8] * 6, knows=0.0))
    assert "rows" in choice.chosen.family
    zero_shot, kept = choice.table[0], kept_row(choice)
    assert zero_shot.candidate.family == ()
    assert kept.accuracy_tuned is not None and zero_shot.accuracy_tuned is not None
    assert kept.accuracy_tuned > zero_shot.accuracy_tuned + 0.3


def test_names_that_know_all_are_left_alone() -> None:
    choice = decide(world([4] * 6, val=30, knows=1.0, blur=0.4))
    assert choice.chosen.family == ()
    assert "No gain measured over zero-shot" in " ".join(choice_notes(choice.to_dict()))


def kept_row(choice: Choice) -> Judgement:
    return next(row for row in choice.table if row.candidate.family == choice.chosen.family)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("counts", [[5] * 6, [2] * 8, [1, 9, 3, 2, 6]])
def test_the_choice_is_simple_and_never_behind_zero_shot_or_rows(
    counts: list[int], seed: int
) -> None:
    choice = decide(world(counts, knows=0.3, seed=seed))
    kept = kept_row(choice)
    assert kept.behind <= kept.error
    for row in choice.table:
        if {*row.candidate.family} <= {"rows"}:
            assert kept.nll <= row.nll
    simpler = choice.table[: choice.table.index(kept)]
    floor = min(row.nll for row in choice.table if {*row.candidate.family} <= {"rows"})
    assert all(row.behind > row.error or row.nll > floor for row in simpler)


@pytest.mark.parametrize(("knows", "without"), [(0.0, ("map",)), (0.3, ("rows",))])
def test_more_photos_gain_along_a_curve_that_survives_json(
    knows: float, without: tuple[str, ...]
) -> None:
    counts = [12, 12, 6, 12, 12, 12]
    task = world(counts, knows=knows, blur=0.5, without=("prompt", "colours", *without))
    choice = decide(task)
    curve = choice.curve
    assert curve is not None
    assert curve.photos == pytest.approx((2.8, 5.5, 8.25), abs=0.4)
    assert curve.accuracy[0] < curve.accuracy[-1] < curve.expected
    assert curve.low <= curve.expected <= curve.high
    assert curve.twice == 2 * sum(counts) / 6
    right = (choice.out_of_fold.argmax(dim=1) == task.labels[choice.judging]).double().mean()
    assert curve.accuracy[-1] == pytest.approx(float(right))
    assert sorted(name for name, *_ in curve.gains) == [f"class {label}" for label in range(6)]
    again = Choice.from_dict(
        json.loads(json.dumps(choice.to_dict())), choice.out_of_fold, choice.judging
    )
    assert again.curve == curve
    assert "twice what there is, expect" in " ".join(curve_notes(curve.to_dict()))


def test_what_photos_do_not_teach_has_no_curve() -> None:
    assert decide(world([4] * 6, val=30, knows=1.0, blur=0.4)).curve is None


@pytest.mark.parametrize("new_classes", [False, True])
def test_no_fold_has_seen_what_it_judges(
    new_classes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = world([6] * 8, val=2)
    folds: list[Fold] = []
    plain = choice_module._fit

    def noting(fold: Fold, *rest: object) -> object:
        folds.append(fold)
        return plain(fold, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(choice_module, "_fit", noting)
    decide(task, new_classes=new_classes)
    if not new_classes:
        folds = folds[:4]  # the rest only set classes without photos beside the others
    held: list[int] = []
    for fold in folds:
        judged = fold.places[fold.places < len(task.train)].tolist()
        kept = {tuple(image.tolist()) for image in fold.task.train.embeddings}
        assert not kept & {tuple(task.train.embeddings[place].tolist()) for place in judged}
        assert not len(fold.task.val)
        assert len(kept) + len(judged) == len(task.train)
        assert bool((~fold.inside).any()) == new_classes
        seen = fold.group("tuned")
        held += [
            place for place, flag in zip(fold.places.tolist(), seen.tolist(), strict=True) if flag
        ]
    photos = [place for place in held if place < len(task.train)]
    assert sorted(photos) == list(range(len(task.train)))


def test_held_out_classes_judge_where_new_classes_matter() -> None:
    choice = decide(world([6] * 8), new_classes=True)
    assert choice.images == {"tuned": 48, "new": 48}
    assert all(row.accuracy_new is not None for row in choice.table)
    alone = decide(world([6] * 8))
    assert alone.images == {"tuned": 48, "new": 0}


def test_out_of_fold_logits_are_those_of_a_model_that_was_fitted_without_the_photo() -> None:
    task = world([4] * 5, knows=0.0, map_side="classes", map_ridge=0.01, rows_weight=1.0)
    task = replace(task, config=replace(task.config, added=("map", "rows")))
    choice = decide(task)
    assert choice.chosen == Candidate(False, "classes", 0.01, 1.0)
    assert not choice.out_of_fold.isnan().any()
    # the photo itself would raise the logit of its class
    right = choice.out_of_fold.argmax(dim=1) == task.labels
    assert 0.5 < right.float().mean() <= 1


def test_one_photo_a_class_and_validation_images() -> None:
    choice = decide(world([1] * 6, val=5, knows=0.0))
    assert choice.images == {"tuned": 30, "new": 0}
    assert "rows" in choice.chosen.family
    assert choice.out_of_fold.isnan().all()


def test_one_photo_a_class_and_nothing_else() -> None:
    choice = decide(world([1] * 8, knows=0.5))
    assert choice.images == {"tuned": 0, "new": 8}
    assert choice.chosen.weight == UNJUDGED_WEIGHT
    assert not choice.out_of_fold.isnan().any()  # judged by names


def test_two_photos_in_all() -> None:
    choice = decide(world([1, 1], knows=0.0))
    assert choice.chosen == Candidate(weight=UNJUDGED_WEIGHT) and choice.table == ()
    assert choice.out_of_fold.isnan().all()
    assert "nothing could be judged" in choice_notes(choice.to_dict())[0]


def test_two_classes() -> None:
    choice = decide(world([5, 5], knows=0.0))
    assert choice.chosen.family
    assert choice.outside == UNCHANGED  # no class can be held out


def test_new_classes_get_their_own_scale() -> None:
    choice = decide(world([12] * 12, knows=0.5), new_classes=True)
    assert "rows" in choice.chosen.family
    assert choice.outside.scale != 1 and choice.outside.offset != 0


def test_settings_leave_less_to_decide() -> None:
    config = train_config(method="capt")
    assert choosable(config) == {"prompt", "map", "rows"}
    families = {c.family for c in candidates(config, judged=True)}
    assert len(families) == 8
    pinned = replace(config, added=("map",), without=("prompt",))
    families = {c.family for c in candidates(pinned, judged=True)}
    assert families == {("map",), ("map", "rows")}
    fixed = train_config(method="map", map_side="images", map_ridge=0.5)
    assert candidates(fixed, judged=True) == [Candidate(False, "images", 0.5)]
    assert candidates(train_config(method="coop"), judged=True) == [Candidate(True)]


def test_parts_that_are_trained_with_the_prompt_pin_it() -> None:
    config = train_config(method="capt", added=("semantic-experts",))
    assert choosable(config) == {"map", "rows"}
    assert all(candidate.prompt for candidate in candidates(config, judged=True))


def test_a_chosen_candidate_becomes_settings() -> None:
    config = train_config(method="capt")
    applied = Candidate(False, "images", 0.03, 0.2).applied(config)
    assert applied.parts == config.parts - {"prompt"}
    assert (applied.map.side, applied.map.ridge, applied.rows.weight) == ("images", 0.03, 0.2)
    assert Candidate().applied(config).parts == config.parts - {"prompt", "map", "rows"}


def test_a_choice_survives_json_and_is_shown() -> None:
    choice = decide(world([6] * 8, knows=0.0), new_classes=True)
    read = Choice.from_dict(
        json.loads(json.dumps(choice.to_dict())), choice.out_of_fold, choice.judging
    )
    assert read.to_dict() == choice.to_dict() and read.chosen == choice.chosen
    header, rows = choice_rows(choice.to_dict())
    assert len(rows) == len(choice.table) + 1 and {len(row) for row in rows} == {len(header)}
    assert sum(row[0].startswith("→") for row in rows) == 1
    assert rows[0][0].endswith("zero-shot") and rows[-1][0] == "logistic regression"


def test_nan_in_a_fold_is_an_error_that_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object) -> None:
        raise FloatingPointError("the cross_entropy term became nan")

    monkeypatch.setattr(choice_module, "train_epochs", diverge)
    task = world([4] * 4)
    task = replace(task, config=replace(task.config, without=("colours",)))
    with pytest.raises(choice_module.RunError, match=r"cross_entropy.*lower tuning\.learning_rate"):
        choose(task, lambda tuned: None, "abcdef", new_classes=False)  # type: ignore[arg-type, return-value]


def test_a_map_behind_a_prompt_is_tried_where_the_prompt_is_ahead() -> None:
    def row(prompt: bool, side: str | None, nll: float) -> Judgement:
        return Judgement(Candidate(prompt, side), None, None, nll, 0.0, 0.0)

    table = [row(True, None, 1.0), row(False, "images", 1.1)]
    assert is_ahead("prompt", "map", table)
    assert not is_ahead("map", "prompt", table)
    assert is_ahead("prompt", "map", table[:1])
    assert not is_ahead("prompt", "map", table[1:])


def test_the_seed_decides_the_folds() -> None:
    first, again = (decide(world([5] * 6), new_classes=True) for _ in range(2))
    assert torch.equal(first.out_of_fold, again.out_of_fold)


def test_of_many_classes_some_are_compared_and_one_fold_of_all_judges_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = world([4] * 12, knows=0.0, without=("prompt", "colours", "map"), rows_weight=1.0)
    task, folds = replace(task, config=replace(task.config, added=("rows",))), list[Fold]()
    plain = choice_module._fit

    def noting(fold: Fold, *rest: object) -> object:
        folds.append(fold)
        return plain(fold, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(choice_module, "_fit", noting)
    monkeypatch.setattr(choice_module, "_MOST_COMPARED", 6)
    monkeypatch.setattr(folds_module, "_MANY", 6)
    monkeypatch.setattr(folds_module, "_MOST_SCORES", 12 * 5)
    choice = decide(task)
    assert "judged on 6 of the 12 classes" in capsys.readouterr().err
    compared, (last,), placed = folds[:4], folds[4:5], folds[5:]
    (classes,) = {fold.classes for fold in compared + placed}
    assert len(classes) == 6 and set(classes) < set(task.tuned)
    assert last.classes == task.tuned
    assert choice.chosen == Candidate(weight=1.0)
    # at most 5 photos of 12 classes, by a fold that has not seen them
    assert choice.out_of_fold.shape == (5, 12)
    assert choice.judging.tolist() == sorted({*choice.judging.tolist()})
    seen = last.task.train.embeddings
    for row in choice.judging.tolist():
        assert not (seen == task.train.embeddings[row]).all(dim=1).any()
    rows = discriminant(seen, last.task.labels, 12)
    judged = task.train.embeddings[choice.judging]
    expected = SCALE * judged @ task.reference.T + judged @ rows.weight.T + rows.bias
    torch.testing.assert_close(choice.out_of_fold, expected)
