"""Compute the validation images' scores for a bundle's own classes."""

from dataclasses import replace

import numpy as np
import torch

from capt_deploy.confidence.decisions import FEWEST_IMAGES, Decisions
from capt_deploy.confidence.distance_aware import applied
from capt_deploy.confidence.top_label import probabilities_of
from capt_deploy.core.console import say
from capt_train.calibrate.calibrators import cross_fitted
from export.source.model import Source


@torch.no_grad()
def decisions_of(source: Source) -> Decisions | None:
    """Return what validation images get from calibrations that were fitted on the others of them.

    None, and a note, where the run has none, or none of them is of an exported class.
    """
    known = source.validation
    kept = None if known is None else known.labels >= 0
    count = 0 if kept is None else int(kept.sum())
    if known is None or kept is None or count < FEWEST_IMAGES:
        if known is not None:
            why = f"{count} validation images are of the exported classes, {FEWEST_IMAGES} is least"
        elif "runs" in source.training:
            why = "merged runs have none"
        else:
            why = "the run kept no validation images; tune it with some, by this version"
        say(f"note: no prediction sets and no rejection: {why}")
        return None
    backbone = source.learner.backbone
    raw = (backbone.scale * known.embeddings @ source.rows.cpu().T + backbone.logit_bias).numpy()
    labels = known.labels.numpy()
    probabilities = np.zeros(raw.shape)
    factors = None if source.factors is None else source.factors.numpy()
    asked = known.tuned_logits.numpy(), known.tuned_labels.numpy()
    calibration = source.calibration
    for rows, own in cross_fitted(calibration.kind, *asked, calibration.label_noise):
        vector = own.vector and own.vector.chosen(known.places)
        scaled = replace(own, vector=vector).logits(raw[rows])
        logits = scaled if factors is None else applied(scaled, factors)
        probabilities[rows] = probabilities_of(logits, own.top_label)
    # Energies need no labels, and are compared without any temperature
    final = calibration.logits(raw)  # its vector is of the exported classes already
    energies = calibration.temperature * (final if factors is None else applied(final, factors))
    listed = kept.numpy()
    return Decisions.of(probabilities[listed], energies[listed], labels[listed])
