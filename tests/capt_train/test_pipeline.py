from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from capt_deploy.core.errors import ConfigError, RunError
from capt_deploy.core.files import sha256_file
from capt_deploy.data.datasets import read_dataset
from capt_deploy.data.preprocess import preprocess
from capt_train import pipeline
from capt_train.calibrate.label_noise import fit_label_noise
from capt_train.calibrate.temperature import fit_temperature
from capt_train.clip.backbone import Backbone
from capt_train.config import TrainConfig
from capt_train.confusion.bank import ConfusionBank
from capt_train.data.features import Features
from capt_train.data.fewshot import FewShotSplit, choose
from capt_train.method.class_rows import UNCHANGED
from capt_train.method.learner import Learner
from capt_train.parts import OWN
from capt_train.pipeline import dry_run, train
from capt_train.run import folder as runs
from capt_train.run import visual_side
from capt_train.run.evaluate import evaluate_run
from capt_train.run.fitting import HeldOut, Outcome, fit
from capt_train.run.folder import TunedModel, load_run
from capt_train.run.setup import Setup
from capt_train.tune import strength, text_side
from capt_train.tune.candidates import Candidate
from capt_train.tune.choice import Choice
from capt_train.tune.stages import TuningTask
from capt_train.tune.strength import Trial
from capt_train.tune.tune import tune
from tests.banks import count_matrix
from tests.configs import changed

Configure = Callable[..., TrainConfig]
RUN_FILES = {
    runs.README,
    "config.json",
    "split.json",
    "suspects.json",
    "last.safetensors",
    "best.safetensors",
    "confusions.json",
    "confusions.png",
    "result.json",
    "validation.safetensors",
    "metrics.json",
}
BOTH_SIDES = {
    *("text-last.safetensors", "text-best.safetensors"),
    *("sentences.json", "colours.json", "bank.safetensors"),
}
VISUAL = ("adapter", "sample-experts")


Staged = tuple[Path, list[TuningTask], list[ConfusionBank | None]]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def staged(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Staged:
    """Return a run of both sides, and of each of its stages the task and the last bank."""
    run = tmp_path_factory.mktemp("runs") / "staged"
    few = {
        "tuning_epochs": 1,
        "visual_epochs": 1,
        "visual_views": 2,
        "visual_strength": "1",
    }
    config = configure(method="coop", added=("infonce", *VISUAL), **few)
    tasks: list[TuningTask] = []
    banks: list[ConfusionBank | None] = []

    def noting(learner: Learner, task: TuningTask, *others: Any) -> Any:
        state, bank = tune(learner, task, *others)
        tasks.append(task)
        banks.append(bank)
        return state, bank

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_side, "tune", noting)
        patch.setattr(visual_side, "tune", noting)
        train(changed(config, visual_adapter_scale=0.5, visual_adapter_exponent=2.0), run)
    return run, tasks, banks


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_a_run_folder_holds_what_is_documented_and_nothing_else(
    finished: Path, tuned_run: Path
) -> None:
    assert {file.name for file in finished.iterdir()} == RUN_FILES
    assert {file.name for file in tuned_run.iterdir()} == RUN_FILES | BOTH_SIDES
    documented = (finished / runs.README).read_text()
    assert all(name in documented for name in RUN_FILES - {runs.README} | {"sentences.json"})


def test_metrics_have_zero_shot_beside_tuned_on_every_scope(finished: Path) -> None:
    report = read(finished / "metrics.json")
    sizes = {"base": 10, "new": 10, "all": 20}
    for part in (report, report["zero_shot"]):
        assert {scope: part[scope]["n"] for scope in sizes} == sizes
        assert 0 <= part["harmonic_mean"] <= 1
    assert report["split"] == "test"
    assert (report["method"], report["shots"], report["seed"]) == ("prompt", 3, 1)
    assert report["parts"] == ["coa", "margin", "moments", "prompt"]
    assert report["trained_parameters"] == 4 * 32  # the context
    assert report["strength"] == 1.0
    assert report["mixture"] == {"inside": [0.0, 1.0], "outside": [0.0, 1.0]}


def test_the_result_has_what_was_fitted_and_on_how_many_images(finished: Path) -> None:
    result, report = read(finished / "result.json"), read(finished / "metrics.json")
    assert result["images"] == report["images"] == {"train": 6, "val": 8}
    assert result["calibration"]["temperature"] == report["temperature"] != 1.0
    assert result["calibration"]["kind"] == report["calibrator"] == "temperature"  # of 8 images
    keys = {
        "calibration",
        "calibrators",
        "zero_shot_temperature",
        "images",
        "pairs",
        "mixture",
        "outside",
        "strength",
    }
    assert result.keys() == keys | {"trained_parameters", "trial", "stages"}
    (stage,) = result["stages"]
    assert stage.keys() == {"epochs", "best_epoch", "history"}
    assert stage["epochs"] == len(stage["history"]) == 3
    assert result["trial"] is None


def test_a_run_of_both_sides_has_its_stages_and_what_was_chosen_for_the_visual_one(
    tuned_run: Path,
) -> None:
    result, report = read(tuned_run / "result.json"), read(tuned_run / "metrics.json")
    text, visual = ({*stage["history"][0]} for stage in result["stages"])
    assert [stage["epochs"] for stage in result["stages"]] == [5, 3]
    terms = {"cross_entropy", "coa", "infonce", "margin", "moments", "balance", "val_nll"}
    assert text == terms
    assert visual == terms - {"moments"} | {"consistency"}
    assert report["parts"] == sorted({*OWN} - {"visual-prompts"})
    assert report["trained_parameters"] == result["trained_parameters"] > 4 * 32
    assert result["strength"] == report["strength"] == 0.75  # as it was asked for
    assert result["trial"] is None


def test_zero_shot_metrics_equal_a_prediction_by_hand(
    finished: Path, photos: Path, tiny_backbone: Backbone
) -> None:
    dataset = read_dataset(photos)
    text = tiny_backbone.text_embeddings([f"a photo of a {name}." for name in dataset.class_names])
    right = 0
    for item in dataset.splits["test"]:
        pixels = np.stack([preprocess(dataset.path(item), tiny_backbone.preprocess)])
        image = tiny_backbone.image_embeddings(torch.from_numpy(pixels))
        right += int((image @ text.T).argmax()) == item.label
    zero_shot = read(finished / "metrics.json")["zero_shot"]
    assert zero_shot["all"]["accuracy"] == pytest.approx(right / 20)


def test_each_model_has_the_best_temperature_for_validation_images_of_the_tuned_classes(
    finished: Path, photos: Path
) -> None:
    model, dataset = load_run(finished), read_dataset(photos)
    items = [item for item in dataset.splits["val"] if item.label < 2]
    pixels = np.stack([preprocess(dataset.path(own), model.backbone.preprocess) for own in items])
    images = model.backbone.image_embeddings(torch.from_numpy(pixels)).double()
    labels = torch.tensor([item.label for item in items])
    sides = [
        (model.class_rows.rows, model.fitted.temperature),
        (model.zero_shot, model.fitted.zero_shot_temperature),
    ]
    for text, temperature in sides:
        logits = model.backbone.scale * images @ text[:2].double().T

        def cost(t: float, logits: torch.Tensor = logits) -> float:
            nll = cross_entropy(logits / t, labels, reduction="sum")
            return float(nll) + math.log(t) ** 2 / (2 * 0.5**2)

        assert min(torch.logspace(-1.3, 1.3, 200).tolist(), key=cost) == pytest.approx(
            temperature, rel=0.016
        )
        assert cost(temperature) < min(cost(0.98 * temperature), cost(1.02 * temperature))


def test_with_wrong_labels_the_temperature_is_that_of_right_ones(
    configure: Configure, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(classes="base", tuning_label_noise="0.3", calibration_calibrator="isotonic")
    train(config, tmp_path / "run")
    assert "about 30% of the labels seem to be wrong" in capsys.readouterr().err
    model, dataset = load_run(tmp_path / "run"), read_dataset(photos)
    items = [item for item in dataset.splits["val"] if item.label < 2]
    pixels = np.stack([preprocess(dataset.path(own), model.backbone.preprocess) for own in items])
    images = model.backbone.image_embeddings(torch.from_numpy(pixels))
    labels = torch.tensor([item.label for item in items])
    expected = fit_label_noise(model.raw_logits(images)[:, :2], labels, 0.3).temperature
    assert model.fitted.calibration.calibrator == "temperature"
    assert model.fitted.temperature == pytest.approx(expected, rel=1e-4)
    assert model.fitted.zero_shot_temperature != 1.0


def test_wrong_labels_are_found_by_folds_that_have_not_seen_them(configure: Configure) -> None:
    """A fifth of 200 labels is wrong; the folds know the right ones, but for some photos."""
    labels = torch.arange(200) % 4
    wrong = torch.arange(200) % 5 == 0
    logits = 12.0 * torch.eye(4)[torch.where(wrong, (labels + 1) % 4, labels)]
    judging = labels.argsort()[10:].sort().values
    images = {"tuned": 190, "new": 0}
    choice = Choice(Candidate(prompt=True), UNCHANGED, (), None, images, logits[judging], judging)
    features = Features(torch.randn(200, 32), labels)
    task = TuningTask(10.0, (0, 1, 2, 3), features, features, torch.randn(4, 32), configure())
    assert pipeline._label_noise(choice, task) == pytest.approx(0.2, abs=0.03)


def test_few_validation_images_are_noted(
    configure: Configure, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    for name in ("blue_sky", "green_leaf"):
        for number in range(21):
            Image.new("L", (8, 8), 5 * number).save(own / "val" / name / f"more {number}.png")
    config = configure(data=str(own), classes="base", method="zeroshot")
    report = train(config, tmp_path / "enough")
    assert report["images"]["val"] == 50
    assert "calibrated on no more" not in capsys.readouterr().err
    (own / "val" / "blue_sky" / "0.png").unlink()
    train(config, tmp_path / "few")
    note = "note: confidences are calibrated on only 49 images"
    assert note in capsys.readouterr().err.splitlines()


def test_pairs_count_the_zero_shot_errors_among_the_training_images(
    configure: Configure, finished: Path, photos: Path, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    """The tuned classes need not be the first: here they are 1 and 3."""
    other, dataset, tuned = tmp_path / "other", read_dataset(photos), (1, 3)
    whole = choose(dataset, "all", 6, 1)
    train_items, val = (
        tuple(item for item in items if item.label in tuned) for items in (whole.train, whole.val)
    )
    digests = {item.path: whole.sha256[item.path] for item in (*train_items, *val)}
    other.mkdir()
    shutil.copy(finished / "config.json", other)
    replace(whole, tuned=tuned, train=train_items, val=val, sha256=digests).save(
        other / "split.json"
    )
    train(configure(method="zeroshot"), tmp_path / "run", split_from=other)
    names = [f"a photo of a {dataset.class_names[label]}." for label in tuned]
    text = tiny_backbone.text_embeddings(names)
    found: Counter[tuple[int, int]] = Counter()
    for item in train_items:
        pixels = np.stack([preprocess(dataset.path(item), tiny_backbone.preprocess)])
        image = tiny_backbone.image_embeddings(torch.from_numpy(pixels))
        found[item.label, tuned[int((image @ text.T).argmax())]] += 1
    wrong = [[*pair, count] for pair, count in sorted(found.items()) if len({*pair}) == 2]
    assert len(train_items) == 12
    assert read(tmp_path / "run" / "result.json")["pairs"] == wrong != []


def test_a_zeroshot_run_tunes_nothing_and_equals_zero_shot(
    configure: Configure, tmp_path: Path
) -> None:
    report = train(configure(method="zeroshot"), tmp_path / "run")
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert names == RUN_FILES - {"last.safetensors", "best.safetensors"}
    assert report["trained_parameters"] == 0
    assert report["all"]["accuracy"] == report["zero_shot"]["all"]["accuracy"]
    assert report["base"] is None


def test_a_second_run_with_the_same_seed_has_the_same_weights(
    configure: Configure, finished: Path, tmp_path: Path
) -> None:
    train(configure(classes="base"), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(finished)
    other = tmp_path / "other"
    train(configure(classes="base", seed=2), other)
    assert weights(other) != weights(finished)


def test_an_unsplit_folder_is_tuned_on_as_a_whole_and_measured_by_cross_validation(
    configure: Configure, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = configure(data=str(photos / "train"), method="coop", shots=None), tmp_path / "run"
    report = train(config, run)
    messages = capsys.readouterr().err
    chosen = {"choice.json", "out_of_fold.safetensors"}
    assert {file.name for file in run.iterdir()} == RUN_FILES | chosen
    assert report["images"] == {"train": 24, "val": 0}
    assert "unused" not in messages
    assert "measured on training photos, each by a model that had not seen it" in messages
    assert report["split"] == "cross-validation"
    assert report["all"]["n"] == report["zero_shot"]["all"]["n"] == 24
    model, logits = load_run(run), load_file(run / "out_of_fold.safetensors")["logits"]
    labels = torch.tensor([item.label for item in FewShotSplit.load(run / "split.json").train])
    right = (logits.argmax(dim=1) == labels).double().mean()
    assert report["all"]["accuracy"] == pytest.approx(float(right))
    nll = cross_entropy(logits.double() / model.fitted.temperature, labels)
    assert report["all"]["nll"] == pytest.approx(float(nll), rel=1e-4)
    assert "calibrated on only 24 images" in messages  # also by photos that no fold was tuned on
    assert report["temperature"] == pytest.approx(fit_temperature(logits, labels), rel=1e-5)
    assert read(run / "result.json")["zero_shot_temperature"] != 1.0
    kept = model.validation  # for the prediction sets of a bundle
    assert kept is not None and kept.logits is not None
    assert torch.equal(kept.labels, labels)
    shift = kept.logits - logits
    torch.testing.assert_close(shift, shift[:1, :1].expand(shift.shape), atol=1e-4, rtol=0)


def test_a_share_of_an_unsplit_folder_can_be_kept_for_testing(
    configure: Configure, photos: Path, tmp_path: Path
) -> None:
    config = configure(data=str(photos / "train"), method="zeroshot", shots=None, test_share=0.5)
    report = train(config, tmp_path / "run")
    assert report["split"] == "test"
    assert report["images"]["train"] + report["all"]["n"] == 24
    assert report["all"]["n"] == 12
    # the run's own photos: those kept; photos of another folder: all of them, whatever their names
    assert evaluate_run(tmp_path / "run", photos / "train")["all"]["n"] == 12
    assert evaluate_run(tmp_path / "run", photos / "test")["all"]["n"] == 20


def test_with_classes_that_no_photo_shows_training_photos_measure_without_test_images(
    configure: Configure, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(data=str(photos / "train"), method="zeroshot", classes="base")
    report = train(config, tmp_path / "run")
    assert report["split"] == "train"
    assert "measured on train images, which the run has used" in capsys.readouterr().err


@pytest.fixture(scope="module")
def without_val(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the data set without validation images."""
    root = tmp_path_factory.mktemp("data") / "photos"
    shutil.copytree(photos, root, ignore=shutil.ignore_patterns("val"))
    return str(root)


@pytest.mark.parametrize("promising", [False, True])
def test_a_visual_side_that_promises_nothing_is_not_tuned(
    promising: bool,
    configure: Configure,
    without_val: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    asked: list[Trial | None] = []

    def worth_tuning(task: TuningTask, trial: Trial | None) -> bool:
        asked.append(trial)
        return promising

    monkeypatch.setattr(visual_side, "worth_tuning", worth_tuning)
    config = configure(method="coop", added=VISUAL, data=without_val, visual_views=2)
    report = train(config, tmp_path / "run")
    (trial, *_) = asked
    assert trial is not None and trial.seen is not None
    result = read(tmp_path / "run" / "result.json")
    assert len(result["stages"]) == (2 if promising else 1)
    assert result["trial"]["seen"]["mean"] == list(trial.seen.mean)
    if promising:
        return
    assert result["strength"] == 0
    assert not {"adapter", "sample-experts"} & {*report["parts"]}
    model = load_run(tmp_path / "run")
    assert model.visual is None
    assert report["trained_parameters"] == 4 * 32


def test_a_given_strength_is_taken_without_a_trial(configure: Configure, tmp_path: Path) -> None:
    config = configure(method="coop", added=VISUAL, visual_views=2, visual_strength="0.25")
    report = train(config, tmp_path / "run")
    result = read(tmp_path / "run" / "result.json")
    assert result["trial"] is None
    assert report["strength"] == result["strength"] == 0.25
    visual = load_run(tmp_path / "run").visual
    assert visual is not None and visual.strength is not None
    assert float(visual.strength) == 0.25


def test_images_adapt_the_more_the_more_confused_the_frozen_model_is_about_them(
    staged: Staged, photos: Path, tiny_backbone: Backbone
) -> None:
    """METHOD 4: α = s·cᵞ with c = 1 − (p₁ − p₂); at inference its mean over the training images."""
    run, tasks, _ = staged
    names = [f"a photo of a {name}." for name in read_dataset(photos).class_names]
    text = tiny_backbone.text_embeddings(names)
    expected = []
    for item in FewShotSplit.load(run / "split.json").train:
        pixels = np.stack([preprocess(photos / item.path, tiny_backbone.preprocess)])
        image = tiny_backbone.image_embeddings(torch.from_numpy(pixels))[0]
        *_, second, first = sorted((tiny_backbone.scale * text @ image).softmax(dim=0).tolist())
        expected.append(0.5 * (1 - (first - second)) ** 2)
    assert len(expected) == 12
    for task in tasks:
        assert task.alpha is not None
        assert task.alpha.tolist() == pytest.approx(expected, rel=1e-4)
    visual = load_run(run).visual
    assert visual is not None and visual.alpha is not None
    assert float(visual.alpha) == pytest.approx(sum(expected) / 12, rel=1e-4)


def test_each_stage_goes_on_with_the_bank_of_the_one_before(staged: Staged) -> None:
    run, tasks, banks = staged
    first, *later = (task.bank for task in tasks)
    assert len(later) == 1
    assert all(own is written for own, written in zip(later, banks, strict=False))
    counts = [count_matrix(own) for own in (first, *banks) if own is not None]
    assert len(counts) == 3
    assert not any(torch.equal(old, new) for old, new in pairwise(counts))
    written = ConfusionBank(**load_file(run / "bank.safetensors"))
    assert torch.equal(count_matrix(written), counts[-1])


def test_without_strength_or_text_side_a_run_is_the_zero_shot_model(
    configure: Configure, tmp_path: Path
) -> None:
    config = configure(method="zeroshot", added=("adapter",), visual_strength="0", visual_views=2)
    train(config, tmp_path / "run")
    model = load_run(tmp_path / "run")
    assert model.visual is None
    assert torch.equal(model.class_rows.rows, model.zero_shot)


def test_a_strength_of_zero_ends_with_the_prompt_of_the_text_side_alone(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(strength, "best_strength", lambda *_: 0.0)
    config = configure(method="coop", added=VISUAL, visual_views=2)
    fitted: list[TunedModel] = []
    score = pipeline._score
    monkeypatch.setattr(
        pipeline,
        "_score",
        lambda setup, model, *others: (fitted.append(model), score(setup, model, *others))[1],
    )
    run = tmp_path / "run"
    report = train(config, run)
    assert len(read(run / "result.json")["stages"]) == 2
    files = (load_file(run / f"{name}best.safetensors") for name in ("text-", ""))
    alone, beside = (own["module.prompts.0.context"] for own in files)
    assert torch.equal(alone, beside)
    for model in (*fitted, load_run(run)):
        assert model.visual is None
        assert torch.equal(model.learner.state_dict()["prompts.0.context"], alone)
        texts = model.learner.mean_texts(range(4))
        assert torch.equal(model.class_rows.rows, texts)
    assert not {"adapter", "sample-experts"} & {*report["parts"]}


def test_a_resumed_run_decides_by_the_trial_that_it_has_written(
    configure: Configure, without_val: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = configure(method="coop", added=VISUAL, data=without_val, visual_views=2)
    train(config, tmp_path / "run")
    trial = (tmp_path / "run" / "trial.json").read_bytes()
    report = read(tmp_path / "run" / "metrics.json")
    (tmp_path / "run" / "result.json").unlink()

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(visual_side, "run_trial", never)
    assert train(config, tmp_path / "run", resume=True) == report
    assert (tmp_path / "run" / "trial.json").read_bytes() == trial


def test_a_run_whose_trial_diverges_keeps_to_the_text_side_also_when_resumed(
    configure: Configure, without_val: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few = {"data": without_val, "visual_views": 2, "visual_learning_rate": 1e30}
    config, run = configure(method="coop", added=VISUAL, **few), tmp_path / "run"
    report = train(config, run)
    result = (run / "result.json").read_bytes()
    assert report["strength"] == 0
    assert len(json.loads(result)["stages"]) == 1
    (run / "result.json").unlink()
    monkeypatch.delattr(visual_side, "run_trial")
    assert train(config, run, resume=True) == report
    assert (run / "result.json").read_bytes() == result


class _EnoughError(Exception):
    pass


def drawn(
    config: TrainConfig, out: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ...]:
    """Return digests of the validation images that a run begins to tune with."""
    found: list[tuple[str, ...]] = []

    def stop(learner: Learner, task: TuningTask, *_: Any) -> None:
        found.append(task.val.sha256)
        raise _EnoughError

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_MOST_VALIDATED", most)
        patch.setattr(pipeline, "tune_text_side", stop)
        with pytest.raises(_EnoughError):
            train(config, out)
    return found[0]


def test_of_many_validation_images_the_visual_side_gets_a_sample_by_seed(
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configure(method="coop", added=VISUAL, visual_views=2, visual_strength="1")
    everyone = drawn(config, tmp_path / "all", 16, monkeypatch)
    assert len({*everyone}) == 16
    assert "validation images are used" not in capsys.readouterr().err
    some = drawn(config, tmp_path / "some", 6, monkeypatch)
    assert capsys.readouterr().err.count("note: 6 of the 16 validation images are used") == 1
    places = [everyone.index(digest) for digest in some]
    assert len(places) == 6
    assert places == sorted(places)
    assert places != [*range(6)]
    assert drawn(config, tmp_path / "again", 6, monkeypatch) == some
    assert drawn(replace(config, seed=2), tmp_path / "other", 6, monkeypatch) != some
    text = replace(config, added=())  # which keeps no tokens
    assert drawn(text, tmp_path / "text", 6, monkeypatch) == everyone


def test_all_that_is_known_of_sampled_validation_images_belongs_together(
    configure: Configure, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(photos, tmp_path / "data"))
    first = min((data / "val").glob("*/*.png"))  # rows behind it move up
    first.write_bytes(b"no image")
    outcomes: list[Outcome] = []

    def noting(setup: Setup, outcome: Outcome, out: Path) -> tuple[TunedModel, HeldOut]:
        outcomes.append(outcome)
        return fit(setup, outcome, out)

    monkeypatch.setattr(pipeline, "fit", noting)
    monkeypatch.setattr(pipeline, "_MOST_VALIDATED", 7)
    run = tmp_path / "run"
    few = {"visual_views": 2, "visual_strength": "0.5", "data": str(data)}
    config = configure(method="coop", added=VISUAL, **few)
    report = train(config, run)
    [outcome] = outcomes
    val, frozen, learner = outcome.task.val, outcome.frozen.val, outcome.learner
    assert report["images"]["val"] == len(val) == 7
    assert frozen.sha256 == val.sha256
    files = {sha256_file(file): file for file in data.glob("val/*/*.png")}
    shown = [files[digest] for digest in val.sha256]
    names = read_dataset(data).class_names
    assert [names[label].replace(" ", "_") for label in val.labels] == [
        f.parent.name for f in shown
    ]
    assert torch.equal(frozen.labels, val.labels)
    backbone = learner.backbone
    pixels = torch.from_numpy(np.stack([preprocess(f, backbone.preprocess) for f in shown]))
    tokens = outcome.task.val_tokens
    assert tokens is not None
    torch.testing.assert_close(tokens, learner.prefix(pixels).half(), rtol=0, atol=2e-3)
    torch.testing.assert_close(val.embeddings, backbone.image_embeddings(pixels))
    validation = load_run(run).validation
    assert validation is not None
    assert torch.equal(validation.labels, val.labels)
    assert torch.equal(validation.embeddings, learner.embed_tokens(tokens))


def test_a_run_begun_with_other_parts_is_refused(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    content = read(run / "config.json")
    content["parts"] = [*content["parts"], "telepathy"]
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"begun with .*telepathy.*; tune again"):
        load_run(run)


def test_a_dry_run_of_a_run_that_asks_nothing_is_refused(
    configure: Configure, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--llm-dry-run: nothing asks an LLM"):
        dry_run(configure(), tmp_path / "run")
    assert dry_run(configure(added=("semantic-experts",)), tmp_path / "run").startswith(
        "--- prompt 1 ---"
    )
