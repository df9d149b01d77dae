"""Fit mixture and calibration after tuning, and write the results of a run."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from capt_deploy.core.console import counted, say
from capt_deploy.core.files import write_json
from capt_train.calibrate.choose import Choice, candidates, choose_calibration
from capt_train.calibrate.label_noise import fit_label_noise, fit_temperature_to_noisy_labels
from capt_train.confusion.bank import ConfusionBank
from capt_train.confusion.confusions import CONFUSIONS, write_confusions
from capt_train.confusion.plot import plot_confusions
from capt_train.data.features import Embedded
from capt_train.data.validation import VALIDATION, Validation
from capt_train.method.learner import Learner
from capt_train.method.mixture import Mixture, fit_inside, fit_outside
from capt_train.run import folder as runs
from capt_train.run.fitted import Fitted
from capt_train.run.folder import TunedModel
from capt_train.run.setup import Setup
from capt_train.tune.checkpoint import TuningState
from capt_train.tune.cross_validation import out_of_fold_logits
from capt_train.tune.stages import TuningTask
from capt_train.tune.strength import Trial
from capt_train.tune.views import Views

_FEW_FOR_CALIBRATION = 50


@dataclass(frozen=True)
class Outcome:
    """The result of tuning, and what is needed to tune again for cross-validation."""

    learner: Learner
    task: TuningTask
    views: Views  # of the training images
    frozen: Embedded  # embeddings by the frozen model
    states: tuple[TuningState, ...]  # one for each stage
    trial: Trial | None
    bank: ConfusionBank  # after its last update
    make: Callable[[tuple[int, ...]], Learner]  # returns a new learner for the given classes

    @property
    def held_view(self) -> Float[Tensor, "samples dim"]:
        """Return tuned embeddings of the views that were not trained on."""
        return self.views.held_embeddings(self.learner).to(self.task.reference.device)


def fit(setup: Setup, outcome: Outcome, out: Path) -> TunedModel:
    """Fit mixture and calibration; write the confusions and `result.json`."""
    learner, task, split = outcome.learner, outcome.task, setup.split
    before = setup.zero_shot_bank(outcome.frozen.train)
    tuned = split.tuned  # the bank counts among these
    pairs = {(tuned[a], tuned[b]): round(count) for (a, b), count in before.confusions().items()}
    mixture = _mixture(setup, outcome)
    fitted = Fitted(pairs, mixture, learner.strength)
    rows = runs.mixed_rows(learner, setup.zero_shot, split, mixture)
    model = TunedModel(
        setup.backbone, setup.config, split, learner, rows, setup.zero_shot, fitted, {}
    )
    images = _tuned_images(model, outcome)
    choice = _calibration(setup, model, outcome, images)
    model = replace(model, fitted=_calibrated(setup, model, outcome, choice))
    _write_banks(setup, model, outcome, before, out)
    if len(task.val):
        Validation(images, task.val.labels).save(out / VALIDATION)
    write_json(
        out / runs.RESULT,
        {
            **model.fitted.to_dict(),
            "images": {"train": len(task.train), "val": len(task.val)},
            "trained_parameters": learner.size,
            "calibrators": choice and choice.candidates,
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
    return model


@torch.no_grad()
def _mixture(setup: Setup, outcome: Outcome) -> Mixture:
    """Fit π on views that were not trained on (ours); trained views favour the learned prompts."""
    learner, split, config = outcome.learner, setup.split, setup.config
    if "mixture" not in config.parts:
        return Mixture.learned_only(learner.learned)
    images, scale = outcome.held_view, setup.backbone.scale
    labels = outcome.task.train.labels_among(split.tuned).to(images.device)
    texts = runs.all_texts(learner, setup.zero_shot)[:, list(split.tuned)]
    names = setup.pseudo_class_names()
    hand_written = setup.backbone.class_embeddings(names, config.prompt.templates)
    learned = learner.texts_of(names, hand_written).embeddings
    pseudo = torch.cat([hand_written[None], learned])
    return Mixture(
        fit_inside(images, labels, texts, scale),
        fit_outside(images, pseudo, scale, config.mixture.margin),
    )


@torch.no_grad()
def _tuned_images(model: TunedModel, outcome: Outcome) -> Float[Tensor, "samples dim"]:
    """Return tuned embeddings of the validation images."""
    task = outcome.task
    if task.val_tokens is None or model.visual is None:
        return task.val.embeddings
    return model.learner.embed_tokens(task.val_tokens)


def _calibration(
    setup: Setup, model: TunedModel, outcome: Outcome, images: Float[Tensor, "samples dim"]
) -> Choice | None:
    """Choose a calibration on images that were not trained on; None if there are too few."""
    task, tuned = outcome.task, list(outcome.task.tuned)
    if len(task.val):
        raw = model.raw_logits(images)[:, tuned].cpu()
        labels = task.val.labels_among(tuned)
    else:

        def rows_of(learner: Learner) -> Tensor:
            rows = runs.mixed_rows(learner, setup.zero_shot, setup.split, model.fitted.mixture)
            return rows[tuned]

        strength = model.fitted.strength
        raw, labels = out_of_fold_logits(task, outcome.make, strength, rows_of)
    if not len(labels):
        return None
    if len(labels) < _FEW_FOR_CALIBRATION:
        say(f"note: confidences are calibrated on only {counted(len(labels), 'image')}")
    noise = fit_label_noise(raw.cpu(), labels, setup.config.tuning.label_noise)
    if noise.share:
        say(
            f"note: about {noise.share:.0%} of the labels seem to be wrong; "
            "confidences are calibrated for right labels"
        )
        calibration = fit_temperature_to_noisy_labels(raw.numpy(), labels.numpy(), noise.share)
        return Choice(calibration, {})
    all_classes = len(tuned) == len(setup.split.class_names)
    names = candidates(setup.config.calibration.calibrator, all_classes=all_classes)
    return choose_calibration(raw.double().numpy(), labels.numpy(), names)


@torch.no_grad()
def _calibrated(setup: Setup, model: TunedModel, outcome: Outcome, choice: Choice | None) -> Fitted:
    """Return the fitted values with calibrations of the tuned and the frozen model."""
    if choice is None:
        return model.fitted
    # the frozen model has seen none of the images
    images = outcome.frozen.val if len(outcome.task.val) else outcome.frozen.train
    tuned = list(outcome.task.tuned)
    before = model.zero_shot_logits(images.embeddings)[:, tuned].cpu()
    return replace(
        model.fitted,
        calibration=choice.calibration,
        zero_shot_temperature=fit_label_noise(
            before, images.labels_among(tuned), setup.config.tuning.label_noise
        ).temperature,
    )


def _write_banks(
    setup: Setup, model: TunedModel, outcome: Outcome, before: ConfusionBank, out: Path
) -> None:
    """Write the bank, and the confusions on views that were not trained on."""
    tuned = list(setup.split.tuned)
    # the same views for both, so that only the model differs
    frozen = model.zero_shot_logits(outcome.views.untouched)[:, tuned]
    as_tuned = model.logits(outcome.held_view)[:, tuned]
    before, after = (before.updated(z.to(before.counts), momentum=0.0) for z in (frozen, as_tuned))
    outcome.bank.save(out / runs.BANK)
    names = setup.tuned_names
    paths = [item.path for item in outcome.task.train.kept(setup.split.train)]
    write_confusions(out / CONFUSIONS, names, before, after, paths)
    counts = torch.stack([before.counts, after.counts]).cpu().numpy()
    plot_confusions(out / runs.MATRIX, counts, names)
