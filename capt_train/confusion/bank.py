"""The confusion bank of METHOD 2 and the miners of METHOD 3 and 4 (arXiv 2603.02557).

Classes are positions 0..C-1 among the tuned ones, samples are rows of the training features.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor

from capt_deploy.core.files import write_bytes
from capt_deploy.evaluation.evaluate import ClassPair

_FORMAT = {"format": "capt-confusion-bank 2"}  # two keys would be written in any order
_AT_ONCE = 256  # rows; bounds the memory of samples × classes and of queries × confused samples


@dataclass(frozen=True)
class ConfusionBank:
    """The confusions among the training images, and the samples behind them (METHOD 2).

    `N[a,b]` is how many samples of class `a` the model calls `b`; momentum makes the counts
    fractions. Only cells that are not zero are kept: of many classes, few pairs are confused.
    Inference does not use the bank.
    """

    cells: Int[Tensor, "cells 2"]  # true and predicted class, which differ; ascending
    counts: Float[Tensor, " cells"]  # N of these cells
    labels: Int[Tensor, " samples"]
    predicted: Int[Tensor, " samples"]  # pseudo-labels
    confidences: Float[Tensor, "samples classes"]  # probabilities
    embeddings: Float[Tensor, "samples dim"]  # unit norm

    @classmethod
    def fill(
        cls,
        logits: Float[Tensor, "samples classes"],
        labels: Int[Tensor, " samples"],
        embeddings: Float[Tensor, "samples dim"],
    ) -> "ConfusionBank":
        """Return the bank of a model that has not seen the images, the zero-shot one (METHOD 2).

        Args:
            logits: scaled logits of the training images over the tuned classes.
            labels: positions among the tuned classes.
            embeddings: of the images, unit norm.
        """
        confidences = _probabilities(logits)
        predicted = confidences.argmax(dim=1)
        return cls(*_confusions(labels, predicted), labels, predicted, confidences, embeddings)

    def updated(
        self,
        logits: Float[Tensor, "samples classes"],
        momentum: float = 0.9,
    ) -> "ConfusionBank":
        """Return the bank after a write-back, `N ← ρ·N + (1−ρ)·N_new` (METHOD 2, ours).

        Confidences are blended likewise, and the pseudo-labels are the argmax of the blend.
        Predictions on the training images themselves would not do: a tuned model has almost no
        errors on the few shots it was tuned on, so the bank would run dry just when it is needed.

        Args:
            logits: scaled, predicted on views of the training images that were not tuned on.
            momentum: ρ in [0, 1]; 0 keeps nothing of the old bank.
        """
        current = _probabilities(logits)
        cells, counts = _confusions(self.labels, current.argmax(dim=1))
        both, places = torch.cat([self.cells, cells]).unique(dim=0, return_inverse=True)
        blended = torch.cat([momentum * self.counts, (1 - momentum) * counts])
        confidences = momentum * self.confidences + (1 - momentum) * current
        summed = blended.new_zeros(len(both)).index_add(0, places, blended)
        return ConfusionBank(
            both[summed > 0],
            summed[summed > 0],
            self.labels,
            confidences.argmax(dim=1),
            confidences,
            self.embeddings,
        )

    def to(self, device: torch.device) -> "ConfusionBank":
        """Return the same bank on another device."""
        return ConfusionBank(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def save(self, path: Path) -> None:
        """Write the bank as safetensors, atomically."""
        cpu = {name: tensor.cpu().contiguous() for name, tensor in vars(self).items()}
        write_bytes(path, save(cpu, metadata=_FORMAT))

    def confusions(self) -> dict[ClassPair, float]:
        """Return the cells of `N` that are not zero, `{(true, predicted): count}`, by class."""
        cells = zip(self.cells.tolist(), self.counts.tolist(), strict=True)
        return {(true, predicted): count for (true, predicted), count in cells}


def semantic_scores(
    bank: ConfusionBank,
    predicted: Int[Tensor, " batch"],
    confidences: Float[Tensor, "batch classes"],
) -> Float[Tensor, "batch classes"]:
    """Return `S_i = (1 + n_i/Σ_j n_j)·C_i` with `n_i = N[i,p]`, −∞ at `i = p` (METHOD 3, SEM).

    The factor is 1 if no sample was called `p`.

    Args:
        bank: holds the counts.
        predicted: pseudo-label `p` of each sample.
        confidences: probabilities `C` of each sample.
    """
    behind = torch.zeros_like(confidences)
    rows, places = (predicted[:, None] == bank.cells[:, 1]).nonzero(as_tuple=True)
    behind[rows, bank.cells[places, 0]] = bank.counts[places].to(behind)
    total = behind.sum(dim=1, keepdim=True)
    share = torch.where(total > 0, behind / total, 0.0)
    return ((1 + share) * confidences).scatter(1, predicted[:, None], float("-inf"))


def mined_classes(bank: ConfusionBank, k: int) -> Int[Tensor, "samples mined"]:
    """Return `p` and the `k` classes with the highest score after it, for each sample (METHOD 3).

    Of equal scores, that of the first class comes first.

    Args:
        bank: whose samples are mined.
        k: number of classes after `p`; at most C−1 are returned.
    """
    kept = min(k, bank.confidences.shape[1] - 1)
    mined = []
    for predicted, confidences in zip(
        bank.predicted.split(_AT_ONCE), bank.confidences.split(_AT_ONCE), strict=True
    ):
        scores = semantic_scores(bank, predicted, confidences)
        best = scores.argsort(dim=1, descending=True, stable=True)
        mined.append(torch.cat([predicted[:, None], best[:, :kept]], dim=1))
    return torch.cat(mined)


def mined_pairs(bank: ConfusionBank, k: int) -> list[ClassPair]:
    """Return each unordered mined pair `a < b`, the one that most samples mine first (METHOD 3).

    Args:
        bank: whose samples are mined.
        k: as in `mined_classes`.
    """
    classes = bank.confidences.shape[1]
    mined = mined_classes(bank, k)
    predicted, paired = mined[:, :1], mined[:, 1:]
    codes = torch.minimum(predicted, paired) * classes + torch.maximum(predicted, paired)
    distinct, samples = codes.unique(return_counts=True)
    order = samples.argsort(descending=True, stable=True)
    return [divmod(code, classes) for code in distinct[order].tolist()]


def retrieve(
    bank: ConfusionBank, rows: Int[Tensor, " batch"], mined: Int[Tensor, "batch mined"]
) -> Int[Tensor, "batch mined"]:
    """Return for each query and pair class the confused sample most like the query (METHOD 4, SAM).

    `I* = argmax_j cos(f(x), f(u_j))` over samples `u_j` of class `i` that the model gets wrong;
    over those behind the cell `N[i,p]` where there are any, else over all of the class *(ours)*.
    The query itself is never among them.

    Args:
        bank: holds queries and candidates.
        rows: the queries.
        mined: their rows of `mined_classes`: `p`, then the classes paired with it.

    Returns:
        Rows of the bank, −1 where there is no such sample.
    """
    confused = (bank.labels != bank.predicted).nonzero().squeeze(1)
    if not len(confused):
        return torch.full_like(mined, -1)
    chunks = zip(rows.split(_AT_ONCE), mined.split(_AT_ONCE), strict=True)
    return torch.cat([_nearest(bank, confused, queries, classes) for queries, classes in chunks])


def intensity(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    """Return the confusion intensity `c = 1 − (p₁ − p₂)` in [0, 1] (METHOD 4).

    Args:
        logits: scaled zero-shot logits over two classes or more.
    """
    first, second = _probabilities(logits).topk(2, dim=1).values.unbind(dim=1)
    return 1 - (first - second)


def _nearest(
    bank: ConfusionBank,
    confused: Int[Tensor, " confused"],
    rows: Int[Tensor, " batch"],
    mined: Int[Tensor, "batch mined"],
) -> Int[Tensor, "batch mined"]:
    cosines = bank.embeddings[rows] @ bank.embeddings[confused].T
    of_class = bank.labels[confused] == mined[:, :, None]  # (batch, mined, confused)
    allowed = of_class & (confused != rows[:, None, None])
    behind_cell = allowed & (bank.predicted[confused] == mined[:, :1, None])
    preferred = torch.where(behind_cell.any(dim=2, keepdim=True), behind_cell, allowed)
    best = cosines[:, None].masked_fill(~preferred, float("-inf")).argmax(dim=2)
    return torch.where(allowed.any(dim=2), confused[best], -1)


def _probabilities(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    return logits.detach().float().softmax(dim=-1)


def _confusions(
    labels: Int[Tensor, " samples"], predicted: Int[Tensor, " samples"]
) -> tuple[Int[Tensor, "cells 2"], Float[Tensor, " cells"]]:
    """Return the pairs of true class and another that it is called, and how often it is."""
    errors = torch.stack([labels, predicted], dim=1)[labels != predicted]
    cells, counts = errors.unique(dim=0, return_counts=True)
    return cells, counts.float()
