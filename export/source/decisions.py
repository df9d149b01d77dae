"""Compute the validation images' scores for the classes of a bundle."""

from dataclasses import replace

import numpy as np
import torch

from capt_deploy.confidence.decisions import FEWEST_IMAGES, Decisions
from capt_deploy.core.console import say
from capt_train.calibrate.choose import cross_fitted
from export.source.model import Source


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
    tuned_places = [place for place, label in enumerate(known.places) if label in columns]
    if tuned_places:
        held_out = known.tuned_logits[:, [columns[known.places[place]] for place in tuned_places]]
        # models of other folds differ in what they add to all logits of an image; the softmax does
        # not see it, the energy does
        held_out = held_out - held_out.mean(dim=1, keepdim=True)
        logits[:, tuned_places] = held_out + logits[:, tuned_places].mean(dim=1, keepdim=True)
    raw = logits.numpy()
    probabilities = np.zeros(raw.shape)
    tuned = known.tuned_logits.numpy(), known.tuned_labels.numpy()
    calibration = source.calibration
    for rows, fitted in cross_fitted(calibration.calibrator, *tuned, calibration.label_noise):
        selected = replace(fitted.select(known.places), factors=calibration.factors)
        _, probabilities[rows] = selected.apply(raw[rows])
    # Energies need no labels, and are compared without any temperature.
    scaled, _ = calibration.apply(raw)
    energies = calibration.temperature * scaled
    labels = known.labels.numpy()
    return Decisions.from_validation(probabilities[listed], energies[listed], labels[listed])
