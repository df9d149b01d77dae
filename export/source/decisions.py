"""Compute the validation images' scores for the classes of a bundle."""

from dataclasses import replace

import numpy as np
import torch

from capt_deploy.confidence.conformal import fewest_images
from capt_deploy.confidence.decisions import FEWEST_IMAGES, Decisions
from capt_deploy.core.console import say
from capt_train.calibrate.choose import cross_fitted
from export.source.model import Source

_USUAL_COVERAGE = 0.95


@torch.no_grad()
def decisions_from_validation(source: Source) -> Decisions | None:
    """Return scores of each validation image, by a calibration fitted on the other folds.

    Says why and returns None where too few validation images are of the exported classes.
    """
    known = source.validation
    if known is None:
        merged = "runs" in source.training
        kept_none = "the run kept no held-out images; tune it with more photos, by this version"
        why = "merged runs have none" if merged else kept_none
        say(f"note: no prediction sets and no rejection: {why}")
        return None
    listed = (known.labels >= 0).numpy()
    if (count := int(listed.sum())) < FEWEST_IMAGES:
        why = f"expected {FEWEST_IMAGES} validation images of the exported classes, came {count}"
        say(f"note: no prediction sets and no rejection: {why}")
        return None
    backbone = source.learner.backbone
    logits = source.rows.cpu().logits(known.embeddings, backbone.scale) + backbone.logit_bias
    # the rows may have been fitted to these images, their logits not
    columns = {label: column for column, label in enumerate(known.tuned)}
    places = [place for place, label in enumerate(known.places) if label in columns]
    logits[:, places] = known.tuned_logits[:, [columns[known.places[place]] for place in places]]
    raw = logits.numpy().copy()
    probabilities = np.zeros(raw.shape)
    tuned = known.tuned_logits.numpy(), known.tuned_labels.numpy()
    calibration = source.calibration
    for rows, fitted in cross_fitted(calibration.calibrator, *tuned, calibration.label_noise):
        selected = replace(fitted.select(known.places), factors=calibration.factors)
        _, probabilities[rows] = selected.apply(raw[rows])
    # Energies need no labels, and are compared without any temperature.
    logits[:, places] += known.shift[:, None]
    scaled, _ = calibration.apply(logits.numpy())
    energies = calibration.temperature * scaled
    labels = known.labels.numpy()
    if count < (needed := fewest_images(_USUAL_COVERAGE)):
        say(
            f"note: sets with a coverage of {_USUAL_COVERAGE} need {needed} held-out photos of the "
            f"exported classes; with {count}, they hold every class"
        )
    return Decisions.from_validation(probabilities[listed], energies[listed], labels[listed])
