"""Fit a temperature on logits that the tuning has not seen."""

from jaxtyping import Float, Int
from torch import Tensor

_LOWEST, _HIGHEST = 0.05, 20.0


def fit_temperature(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> float:
    """Return the T > 0 that minimises the NLL of softmax(z/T) (Guo et al., arXiv 1706.04599).

    The NLL is convex in β = 1/T with derivative E[Σ_c p_c z_c − z_y], so the root is bisected:
    no step size, no local minimum. Kept within [0.05, 20], for labels that are separated
    perfectly push β to infinity.
    """
    wide = logits.double()
    own = wide.gather(1, labels[:, None]).squeeze(1)

    def slope(beta: float) -> float:
        expected = ((wide * beta).softmax(dim=1) * wide).sum(dim=1)
        return float((expected - own).mean())

    low, high = 1 / _HIGHEST, 1 / _LOWEST
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float((low * high) ** -0.5)
