"""Fit vector scaling on few images; see `capt_deploy.confidence.vector_scaling`."""

import torch
from torch.nn import functional

from capt_deploy.metrics.calibration import Floats, Ints

# Standard deviations of Gaussian priors (ours) on log a_c and, in units of the temperature, on b_c:
# twenty images of a class say little of both.
_SCALE_DEVIATION, _BIAS_DEVIATION = 0.1, 0.5
# On the log of the factor that all classes share, as for the temperature: where logits contradict
# the labels, it would go to 0 and b_c, which is divided by it, to infinity.
_COMMON_DEVIATION = 0.5
_STEPS = 200


def fit_vector(logits: Floats, labels: Ints) -> tuple[Floats, Floats]:
    """Return factors a_c > 0 and offsets b_c, both (classes,), for softmax(a·z + b).

    Minimises the summed NLL of softmax(e^u·a·z + b') plus Gaussian priors on u, log a_c and b'_c.
    The factor that all classes share is left to the temperature that comes after; both are
    returned with mean 0 of log a and of b, and b is in units of z.

    Args:
        logits: scaled logits z, (images, classes).
        labels: (images,) columns.
    """
    wide, targets = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)
    logs, biases, common = (
        torch.zeros(count, dtype=torch.float64, requires_grad=True)
        for count in (wide.shape[1], wide.shape[1], 1)
    )
    optimizer = torch.optim.LBFGS(
        [logs, biases, common], max_iter=_STEPS, line_search_fn="strong_wolfe"
    )

    def cost() -> torch.Tensor:
        optimizer.zero_grad()
        scaled = wide * (common + logs).exp() + biases
        own = logs / _SCALE_DEVIATION, biases / _BIAS_DEVIATION, common / _COMMON_DEVIATION
        prior = torch.cat(own).square().sum()
        total = functional.cross_entropy(scaled, targets, reduction="sum") + prior / 2
        total.backward()
        return total

    optimizer.step(cost)
    with torch.no_grad():
        # Before the temperature, which is about 1/scale
        scale = (common + logs.mean()).exp()
        own = (logs - logs.mean()).exp(), (biases - biases.mean()) / scale
    return own[0].numpy(), own[1].numpy()
