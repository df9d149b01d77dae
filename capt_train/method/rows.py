"""A row for each class with photos, in closed form: Gaussian discriminant analysis (METHOD 5b)."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_LEAST_SPREAD = 0.05  # of class means that differ no more than chance lets them, as a share


class GaussianRows(nn.Module):
    """`z_c += α(f·w_c + b_c) − δ` for the tuned classes; α and δ are settings of the run."""

    weight: Tensor  # w, (tuned, dim)
    bias: Tensor  # b, (tuned,)

    def __init__(self, tuned: int, dim: int) -> None:
        """Make room for the rows of `tuned` classes, all zero."""
        super().__init__()
        self.register_buffer("weight", torch.zeros(tuned, dim))
        self.register_buffer("bias", torch.zeros(tuned))

    def fit(self, images: Float[Tensor, "samples dim"], labels: Int[Tensor, " samples"]) -> None:
        """Replace the rows by those of `discriminant`; labels are positions among the classes."""
        weight, bias = discriminant(images, labels, len(self.bias))
        self.weight.copy_(weight)
        self.bias.copy_(bias)


class Discriminant(NamedTuple):
    """A linear function of the image embedding for each class."""

    weight: Float[Tensor, "classes dim"]
    bias: Float[Tensor, " classes"]


def discriminant(
    images: Float[Tensor, "samples dim"], labels: Int[Tensor, " samples"], classes: int
) -> Discriminant:
    """Return `f·w_c + b_c = log N(f; μ̂_c, Σ̂) − log N(f; ḡ, Σ̂)` of each class.

    GDA as in arXiv 2402.04087: one covariance, that within classes, shrunken to
    `Σ̂ ∝ (N−C)·Σ + tr(Σ)·I`. Three things are ours:

    - Σ̂ has the scale of Σ, so that the value is a log-likelihood ratio in nats, comparable between
      any number of photos.
    - The ratio is taken against the mean ḡ of all classes. It is above 0 only for images that are
      more like the class than like any other, so classes without a row can compete with 0.
    - A class mean is shrunken towards ḡ, `μ̂_c = ḡ + k_c(μ_c − ḡ)`, `k_c = n_c/(n_c + σ_w²/σ_b²)`,
      by the variances within and between classes (empirical Bayes): the mean of one photo is
      trusted about half.

    With one photo a class, nothing is known of the variance within: half of the variance of all
    photos stands for it.

    Args:
        images: unit norm.
        labels: positions among the classes.
        classes: their number; each has at least one image.
    """
    exact, dim = images.double().cpu(), images.shape[1]
    labels = labels.cpu()
    counts = labels.bincount(minlength=classes).double()
    means = torch.zeros(classes, dim, dtype=torch.double).index_add_(0, labels, exact)
    means /= counts[:, None]
    centre = means.mean(dim=0)
    within, spare = exact - means[labels], len(labels) - classes
    if spare:
        covariance = within.T @ within / spare
    else:
        covariance = (exact - centre).T @ (exact - centre) / (2 * len(labels))
    variance = covariance.trace()
    share = dim / (dim + max(spare, 1))
    eye = torch.eye(dim, dtype=torch.double)
    shrunken = (1 - share) * covariance + share * variance / dim * eye
    spread = (means - centre).square().sum(dim=1).mean() * classes / (classes - 1)
    between = torch.maximum(spread - variance * (1 / counts).mean(), _LEAST_SPREAD * spread)
    trust = counts / (counts + variance / between)
    means = centre + trust[:, None] * (means - centre)
    weight = torch.linalg.solve(shrunken, (means - centre).T).T
    # Σ̂⁻¹μ̂ = w + Σ̂⁻¹ḡ, so the two squared norms of the ratio differ by w·(μ̂ + ḡ)
    bias = -0.5 * (weight * (means + centre)).sum(dim=1)
    return Discriminant(weight.to(images), bias.to(images))
