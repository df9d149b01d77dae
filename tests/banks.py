"""The counts of a confusion bank as a matrix."""

import torch
from torch import Tensor

from capt_train.confusion.bank import ConfusionBank


def count_matrix(bank: ConfusionBank) -> Tensor:
    """Return `N[true, predicted]`, (classes, classes)."""
    counts = torch.zeros(bank.confidences.shape[1], bank.confidences.shape[1])
    for (true, predicted), count in zip(bank.cells.tolist(), bank.counts.tolist(), strict=True):
        assert true != predicted
        counts[true, predicted] = count
    return counts
