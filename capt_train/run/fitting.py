"""Fit mixture and calibration after tuning, and write the results of a run."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capt_deploy.core.console import counted, say
from capt_deploy.core.files import write_json
from capt_deploy.data.datasets import Item
from capt_train.calibrate.choose import CalibrationChoice, candidates, choose_calibration
from capt_train.calibrate.label_noise import fit_label_noise, fit_temperature_to_noisy_labels
from capt_train.confusion.bank import ConfusionBank
from capt_train.confusion.confusions import CONFUSIONS, write_confusions
from capt_train.confusion.plot import MOST_DRAWN, plot_confusions
from capt_train.data.features import Embedded, Features
from capt_train.data.validation import VALIDATION, Validation
from capt_train.method.class_rows import UNCHANGED
from capt_train.method.learner import Learner
from capt_train.method.mixture import Mixture, component_logits, fit_inside, fit_outside
from capt_train.run import folder as runs
from capt_train.run.fitted import Fitted
from capt_train.run.folder import TunedModel
from capt_train.run.setup import Setup
from capt_train.tune.candidates import folds_answer
from capt_train.tune.checkpoint import TuningState
from capt_train.tune.choice import Choice
from capt_train.tune.cross_validation import out_of_fold_logits
from capt_train.tune.folds import judging_rows, most_judging
from capt_train.tune.stages import TuningTask
from capt_train.tune.strength import Trial

_FEW_FOR_CALIBRATION = 50


@dataclass(frozen=True)
class Outcome:
    """The result of tuning, and what is needed to tune again for cross-validation."""

    learner: Learner
    task: TuningTask
    frozen: Embedded  # embeddings by the frozen model
    states: tuple[TuningState, ...]  # one for each stage
    choice: Choice | None
    trial: Trial | None
    bank: ConfusionBank | None  # after its last update; None where no part needs it
    make: Callable[[tuple[int, ...]], Learner]  # returns a new learner for the given classes


@dataclass(frozen=True)
class HeldOut:
    """Logits of images that the model was not tuned on, over the tuned classes, uncalibrated.

    Validation images where there are any, otherwise training images by models tuned without them.
    """

    rows: Int[Tensor, " images"]  # of the training or validation images
    items: tuple[Item, ...]
    labels: Int[Tensor, " images"]  # positions among the tuned classes
    frozen: Float[Tensor, "images tuned"]  # of the frozen model
    tuned: Float[Tensor, "images tuned"]

    def __len__(self) -> int:
        return len(self.labels)


def fit(setup: Setup, outcome: Outcome, out: Path) -> tuple[TunedModel, HeldOut]:
    """Fit mixture and calibration; write the confusions and `result.json`."""
    learner, task, split = outcome.learner, outcome.task, setup.split
    pairs = setup.zero_shot_confusions(outcome.frozen.train)
    images = _tuned_images(outcome)
    mixture = _mixture(setup, outcome, images)
    chosen = outcome.choice is not None and folds_answer(setup.config)
    outside = outcome.choice.outside if outcome.choice is not None and chosen else UNCHANGED
    fitted = Fitted(pairs, mixture, learner.strength, outside=outside)
    rows = runs.mixed_rows(learner, setup.zero_shot, split, fitted)
    model = TunedModel(
        setup.backbone, setup.config, split, learner, rows, setup.zero_shot, fitted, {}
    )
    held_out = _held_out(setup, model, outcome, images)
    calibrators: Mapping[str, Mapping[str, float]] = {}
    if len(held_out):
        fitted, calibrators = _calibrated(setup, fitted, held_out)
        model = replace(model, fitted=fitted)
    _write_confusions(setup, model, outcome, held_out, out)
    if len(task.val):
        kept = held_out.rows
        Validation(images[kept], task.val.labels[kept]).save(out / VALIDATION)
    elif len(held_out) and model.visual is None:
        embeddings, labels = task.train.embeddings[held_out.rows], task.train.labels[held_out.rows]
        Validation(embeddings, labels, held_out.tuned).save(out / VALIDATION)
    write_json(
        out / runs.RESULT,
        {
            **model.fitted.to_dict(),
            "images": {"train": len(task.train), "val": len(task.val)},
            "trained_parameters": learner.size,
            "calibrators": calibrators,
            "trial": outcome.trial and asdict(outcome.trial),
            "stages": [
                {
                    "epochs": state.epoch,
                    "best_epoch": state.best_epoch,
                    "history": state.history,
                }
                for state in outcome.states
            ],
        },
    )
    return model, held_out


@torch.no_grad()
def _tuned_images(outcome: Outcome) -> Float[Tensor, "samples dim"]:
    """Return tuned embeddings of the validation images."""
    task = outcome.task
    if task.val_tokens is None or outcome.learner.visual is None:
        return task.val.embeddings
    return outcome.learner.embed_tokens(task.val_tokens)


@torch.no_grad()
def _training_images(outcome: Outcome) -> Float[Tensor, "samples dim"]:
    """Return tuned embeddings of the training images."""
    task, learner = outcome.task, outcome.learner
    if learner.visual is None or task.views is None or task.views.tokens is None:
        return task.train.embeddings
    return learner.embed_tokens(task.views.tokens[0])


@torch.no_grad()
def _mixture(setup: Setup, outcome: Outcome, validation: Float[Tensor, "samples dim"]) -> Mixture:
    """Fit π on validation images; without any on training images, which favour what was learned."""
    learner, split, config = outcome.learner, setup.split, setup.config
    if "mixture" not in config.parts:
        return Mixture.learned_only(learner.learned)
    task, scale = outcome.task, setup.backbone.scale
    images, shown = (validation, task.val)
    if not len(task.val):
        images, shown = _training_images(outcome), task.train
    images = images.to(task.reference.device)
    rows = _judging(setup, len(images), "fit the mixture")
    images, labels = images[rows], shown.labels_among(split.tuned)[rows].to(images.device)
    texts = runs.all_texts(learner, setup.zero_shot)[:, list(split.tuned)]
    names = setup.pseudo_class_names()
    hand_written = setup.backbone.class_embeddings(names, config.prompt.templates)
    learned = learner.texts_of(names, hand_written).embeddings
    pseudo = torch.cat([hand_written[None], learned])
    return Mixture(
        fit_inside(component_logits(images, texts, scale), labels),
        fit_outside(component_logits(images, pseudo, scale), config.mixture.margin),
    )


def _held_out(
    setup: Setup, model: TunedModel, outcome: Outcome, validation: Float[Tensor, "samples dim"]
) -> HeldOut:
    """Return the images that calibrate; none with one photo a class and no validation images."""
    task, split, choice = outcome.task, setup.split, outcome.choice
    tuned = list(split.tuned)

    def frozen(images: Features, rows: Int[Tensor, " rows"]) -> Float[Tensor, "rows tuned"]:
        return model.zero_shot_logits(images.embeddings[rows])[:, tuned].cpu()

    if len(task.val):
        images = outcome.frozen.val
        rows = _judging(setup, len(images), "calibrate")
        logits = model.raw_logits(validation[rows])[:, tuned].cpu()
        kept = task.val.kept(split.val)
        items = tuple(kept[row] for row in rows.tolist())
        labels = task.val.labels_among(tuned)[rows]
        return HeldOut(rows, items, labels, frozen(images, rows), logits)
    images = outcome.frozen.train
    if setup.config.needs("teacher"):  # which has seen no label
        rows = _judging(setup, len(images), "calibrate")
        say(
            "note: no validation images: confidences are too high if the teacher was tuned on the "
            "training photos"
        )
        logits = model.raw_logits(task.train.embeddings[rows])[:, tuned].cpu()
    elif choice is not None and _answers(model, setup):
        shift = setup.backbone.logit_bias - choice.outside.offset  # as `mixed_rows` has it
        logits, rows = choice.out_of_fold + shift, choice.judging
    else:

        def logits_of(learner: Learner, embeddings: Tensor) -> Tensor:
            rows = runs.mixed_rows(learner, setup.zero_shot, split, model.fitted)
            other = replace(model, learner=learner, class_rows=rows)
            return other.raw_logits(embeddings)[:, tuned]

        rows = _judging(setup, len(images), "calibrate")
        strength = model.fitted.strength
        logits = out_of_fold_logits(task, outcome.make, strength, logits_of, rows)
        known = ~logits.isnan().any(dim=1)
        logits, rows = logits[known], rows[known]
    kept = images.kept(split.train)
    items = tuple(kept[row] for row in rows.tolist())
    return HeldOut(rows, items, task.labels[rows], frozen(images, rows), logits)


def _judging(setup: Setup, images: int, purpose: str) -> Int[Tensor, " judging"]:
    """Return which of some images calibrate or fit the mixture; a note says if not all do."""
    classes = len(setup.split.tuned)
    if images > (most := most_judging(classes)):
        say(
            f"note: {most:,} of {images:,} photos {purpose}, drawn by seed: "
            f"scores of all for {classes:,} classes would fill the memory"
        )
    return judging_rows(images, classes, setup.config.seed)


def _answers(model: TunedModel, setup: Setup) -> bool:
    """Tell whether what was judged on folds is all that the model is made of."""
    alone = model.visual is None and "mixture" not in setup.config.parts
    return alone and folds_answer(setup.config)


def _calibrated(
    setup: Setup, fitted: Fitted, images: HeldOut
) -> tuple[Fitted, Mapping[str, Mapping[str, float]]]:
    """Return the fitted values with calibrations of both models, and how the calibrators did."""
    if len(images) < _FEW_FOR_CALIBRATION:
        say(f"note: confidences are calibrated on only {counted(len(images), 'image')}")
    labels = images.labels
    noise = fit_label_noise(images.tuned, labels, setup.config.tuning.label_noise).share
    if noise:
        say(
            f"note: about {noise:.0%} of the labels seem to be wrong; "
            "confidences are calibrated for right labels"
        )
        raw = images.tuned.numpy()
        choice = CalibrationChoice(fit_temperature_to_noisy_labels(raw, labels.numpy(), noise), {})
    else:
        all_classes = len(setup.split.tuned) == len(setup.split.class_names)
        names = candidates(setup.config.calibration.calibrator, all_classes=all_classes)
        choice = choose_calibration(images.tuned.double().numpy(), labels.numpy(), names)
    temperature = fit_label_noise(images.frozen, labels, noise).temperature
    calibrated = replace(fitted, calibration=choice.calibration, zero_shot_temperature=temperature)
    return calibrated, choice.candidates


def _write_confusions(
    setup: Setup, model: TunedModel, outcome: Outcome, images: HeldOut, out: Path
) -> None:
    """Write the bank, and the confusions among held-out images, else among the training images."""
    names = setup.tuned_names
    if not len(images):
        say("note: too few photos to hold any out: confusions are of the photos tuned on")
        train, task = outcome.frozen.train, outcome.task
        tuned = list(setup.split.tuned)
        rows = judging_rows(len(train), len(tuned), setup.config.seed)
        kept = train.kept(setup.split.train)
        items = tuple(kept[row] for row in rows.tolist())
        frozen = model.zero_shot_logits(train.embeddings[rows])[:, tuned].cpu()
        logits = model.raw_logits(_training_images(outcome)[rows])[:, tuned].cpu()
        images = HeldOut(rows, items, task.labels[rows], frozen, logits)
    before, after = (
        ConfusionBank.fill(logits, images.labels, logits[:, :0])
        for logits in (images.frozen, images.tuned)
    )
    if outcome.bank is not None:
        outcome.bank.save(out / runs.BANK)
    paths = [item.path for item in images.items]
    confusions = write_confusions(out / CONFUSIONS, names, before, after, paths)
    drawn = confusions.among_worst(MOST_DRAWN)
    plot_confusions(out / runs.MATRIX, drawn.matrices(), drawn.class_names, len(names))
