"""Class rows and biases of the logits, and rows in closed form: GDA (METHOD 5b)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capt_train.method.base import BuildContext

# α where no photo can judge it: one photo a class, no validation images. Right for text that knows
# the classes, and near the best where it does not (ours).
UNJUDGED_WEIGHT = 0.1
_LEAST_VARIANCE = 1e-6  # of unit-norm embeddings; copies of one photo have none
_LEAST_SPREAD = 0.05  # of class means that differ no more than chance lets them, as a share


@dataclass(frozen=True)
class Outside:
    """How classes without photos stand beside those with photos (ours).

    Logits of tuned classes spread more widely than those of classes known by name alone. One
    temperature for both would leave the latter unsure, and rows would drown them (calibrated
    stacking, arXiv 1605.04253). So `Ŵ_c ← m + γ(Ŵ_c − m)` for a class without photos, m being the
    mean of the tuned classes, and δ is taken off the biases of the tuned ones.
    """

    scale: float = 1.0  # γ
    offset: float = 0.0  # δ, nats

    def texts(
        self, texts: Float[Tensor, "classes dim"], centre: Float[Tensor, " dim"]
    ) -> Float[Tensor, "classes dim"]:
        """Return the rows of classes without photos; `centre` is m."""
        return centre + self.scale * (texts - centre)

    def applied(self, rows: "ClassRows", tuned: Sequence[bool]) -> "ClassRows":
        """Return rows of all classes, as trained, with γ and δ."""
        known = torch.tensor(tuned, device=rows.rows.device)
        centre = rows.rows[known].mean(dim=0)
        texts = torch.where(known[:, None], rows.rows, self.texts(rows.rows, centre))
        return ClassRows(texts, rows.biases - self.offset * known.to(rows.biases))


UNCHANGED = Outside()


@dataclass(frozen=True)
class ClassRows:
    """Rows Ŵ and biases b of the logits z = scale·f·Ŵᵀ + b."""

    rows: Float[Tensor, "classes dim"]
    biases: Float[Tensor, " classes"]

    @classmethod
    def from_texts(cls, texts: Float[Tensor, "classes dim"]) -> "ClassRows":
        """Return class embeddings as rows, with biases of 0."""
        return cls(texts, texts.new_zeros(len(texts)))

    def logits(
        self, embeddings: Float[Tensor, "batch dim"], scale: float
    ) -> Float[Tensor, "batch classes"]:
        """Return the logits of image embeddings."""
        return scale * embeddings.to(self.rows) @ self.rows.T + self.biases

    def cpu(self) -> "ClassRows":
        """Return the same rows without gradients in the memory of the CPU."""
        return ClassRows(self.rows.detach().cpu(), self.biases.detach().cpu())

    def subset(self, places: Sequence[int]) -> "ClassRows":
        """Return the rows and biases of some classes, given by position."""
        return ClassRows(self.rows[list(places)], self.biases[list(places)])


def joined(first: ClassRows, second: ClassRows) -> ClassRows:
    """Return the rows of both, one after the other."""
    rows = torch.cat([first.rows, second.rows.to(first.rows)])
    return ClassRows(rows, torch.cat([first.biases, second.biases.to(first.biases)]))


@dataclass(frozen=True)
class RowTask:
    """What rows are fitted to."""

    images: Float[Tensor, "samples dim"]  # unit norm, as the tuned visual side gives them
    labels: Int[Tensor, " samples"]  # positions among the tuned classes
    texts: Float[Tensor, "classes dim"]  # embeddings of the tuned classes, unit norm
    reference: Float[Tensor, "classes dim"]  # hand-written t⁰ of these
    scale: float  # 1/τ
    weights: Mapping[str, float]  # of the loss terms
    seed: int
    val_images: Float[Tensor, "val dim"]  # may be empty
    val_labels: Int[Tensor, " val"]


class RowPart(nn.Module):
    """Rows of the tuned classes, fitted on cached image embeddings after all else is tuned."""

    folds = True  # whether the logits are linear in the image, so that they can be exported
    # the rows that take the place of the class embeddings, (tuned, dim), and their biases
    weight: Tensor
    bias: Tensor

    def __init__(self, classes: Sequence[int], dim: int) -> None:
        """Make rows of zeros.

        Args:
            classes: indices of the tuned classes.
            dim: of the embeddings.
        """
        super().__init__()
        self.classes = tuple(classes)
        self.register_buffer("weight", torch.zeros(len(self.classes), dim))
        self.register_buffer("bias", torch.zeros(len(self.classes)))

    @classmethod
    def build(cls, context: BuildContext) -> "RowPart":
        """Return the rows before they are fitted."""
        return cls(context.tuned, context.zero_shot.shape[1])

    def fit(self, task: RowTask) -> None:
        """Fit the rows."""
        raise NotImplementedError

    def applied(self, rows: ClassRows, classes: Sequence[int], scale: float) -> ClassRows:
        """Return the class rows of some classes with these in place where a class has one.

        Args:
            rows: Ŵ and b of the logits z = scale·f·Ŵᵀ + b.
            classes: their indices.
            scale: 1/τ.
        """
        targets, sources = self.places(classes)
        weights, biases = rows.rows.clone(), rows.biases.clone()
        weights[targets] = self.weight[sources].to(weights)
        biases[targets] = self.bias[sources].to(biases)
        return ClassRows(weights, biases)

    def places(self, classes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return positions in `classes` of those that have a row, and the positions of the rows."""
        known = {index: place for place, index in enumerate(self.classes)}
        targets = [place for place, index in enumerate(classes) if index in known]
        return targets, [known[classes[place]] for place in targets]

    def added(
        self, images: Float[Tensor, "batch dim"], classes: Sequence[int], scale: float
    ) -> Float[Tensor, "batch classes"] | float:
        """Return what is added to the logits and does not fold."""
        return 0.0


class GaussianRows(RowPart):
    """`z_c += α(f·w_c + b_c)` for the tuned classes, METHOD 5b."""

    def __init__(self, classes: Sequence[int], dim: int, share: float) -> None:
        """Make rows of zeros, to be added with the weight `share`, α."""
        super().__init__(classes, dim)
        self.share = share

    @classmethod
    def build(cls, context: BuildContext) -> "GaussianRows":
        """Return rows with the weight of the settings."""
        share = context.config.rows.weight
        dim = context.zero_shot.shape[1]
        return cls(context.tuned, dim, UNJUDGED_WEIGHT if share is None else share)

    def fit(self, task: RowTask) -> None:
        """Replace the rows by those of `discriminant`."""
        fitted = discriminant(task.images, task.labels, len(self.classes))
        self.weight.copy_(fitted.weight)
        self.bias.copy_(fitted.bias)

    def applied(self, rows: ClassRows, classes: Sequence[int], scale: float) -> ClassRows:
        """Return the class rows with these added; see `RowPart.applied`."""
        targets, sources = self.places(classes)
        weights, biases = rows.rows.clone(), rows.biases.clone()
        weights[targets] += self.share / scale * self.weight[sources].to(weights)
        biases[targets] += self.share * self.bias[sources].to(biases)
        return ClassRows(weights, biases)


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

    With one photo a class, nothing is known of the covariance within: half of that of all photos
    stands for it, with the weight of one photo more than a class has to have.

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
    apart = exact - centre
    covariance = (within.T @ within + apart.T @ apart / (2 * len(labels))) / (spare + 1)
    variance = covariance.trace().clamp(min=_LEAST_VARIANCE)
    share = dim / (dim + max(spare, 1))
    eye = torch.eye(dim, dtype=torch.double)
    shrunken = (1 - share) * covariance + share * variance / dim * eye
    spread = (means - centre).square().sum(dim=1).mean() * classes / (classes - 1)
    spread = spread.clamp(min=_LEAST_VARIANCE)
    between = torch.maximum(spread - variance * (1 / counts).mean(), _LEAST_SPREAD * spread)
    trust = counts / (counts + variance / between)
    means = centre + trust[:, None] * (means - centre)
    weight = torch.linalg.solve(shrunken, (means - centre).T).T
    # Σ̂⁻¹μ̂ = w + Σ̂⁻¹ḡ, so the two squared norms of the ratio differ by w·(μ̂ + ḡ)
    bias = -0.5 * (weight * (means + centre)).sum(dim=1)
    return Discriminant(weight.to(images), bias.to(images))
