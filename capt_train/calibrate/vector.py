"""Calibrate every class by vector scaling (Guo et al., arXiv 1706.04599), on few images."""

import numpy as np
import torch
from torch.nn import functional

from capt_deploy.confidence.calibration import Calibration, VectorScaling
from capt_deploy.metrics.probabilities import Floats, Ints
from capt_train.calibrate import temperature

# Standard deviations of Gaussian priors (ours) on log a_c and, in units of the temperature, on b_c:
# twenty images of a class say little about either.
_SCALE_DEVIATION, _BIAS_DEVIATION = 0.1, 0.5
# On the log of the factor that all classes share, as for the temperature: where logits contradict
# the labels, it would go to 0 and b_c, which is divided by it, to infinity.
_COMMON_DEVIATION = 0.5
_STEPS = 200


def fit(raw: Floats, labels: Ints) -> Calibration:
    """Return vector scaling, and the temperature that fits its result; see `fit_calibration`."""
    vector = fit_vector(raw, labels)
    scaled = np.asarray(Calibration(vector=vector).scale(raw), np.float64)
    return Calibration(temperature.fit(scaled, labels).temperature, vector)


def fit_vector(raw: Floats, labels: Ints) -> VectorScaling:
    """Return factors a_c > 0 and offsets b_c for softmax(a·z + b).

    Minimises the summed NLL of softmax(e^u·a·z + b') plus Gaussian priors on u, log a_c and b'_c.
    The factor that all classes share is left to the temperature that comes after, so log a and b
    have mean 0, and b is in units of z.

    Args:
        raw: scaled logits z, (images, classes).
        labels: (images,) columns.
    """
    logits, targets = torch.tensor(raw, dtype=torch.float64), torch.tensor(labels)
    logs, biases, common = (
        torch.zeros(count, dtype=torch.float64, requires_grad=True)
        for count in (logits.shape[1], logits.shape[1], 1)
    )
    optimizer = torch.optim.LBFGS(
        [logs, biases, common], max_iter=_STEPS, line_search_fn="strong_wolfe"
    )

    def cost() -> torch.Tensor:
        optimizer.zero_grad()
        scaled = logits * (common + logs).exp() + biases
        terms = logs / _SCALE_DEVIATION, biases / _BIAS_DEVIATION, common / _COMMON_DEVIATION
        prior = torch.cat(terms).square().sum()
        total = functional.cross_entropy(scaled, targets, reduction="sum") + prior / 2
        total.backward()
        return total

    optimizer.step(cost)
    with torch.no_grad():
        shared = (common + logs.mean()).exp()
        scales = (logs - logs.mean()).exp()
        offsets = (biases - biases.mean()) / shared
    return VectorScaling(tuple(scales.tolist()), tuple(offsets.tolist()))
