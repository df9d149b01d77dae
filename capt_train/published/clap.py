"""CLAP (arXiv 2312.12730): a linear probe that is held near the class embeddings."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from capt_train.method.class_rows import RowPart, RowTask
from capt_train.published.minibatches import Schedule, minimise

_EPOCHS, _BATCH_SIZE, _RATE = 300, 256, 0.1


class ConstrainedRows(RowPart):
    """Rows `norm(w_c)` that start from the class embeddings t_c, with the penalty λ_c‖w_c − t_c‖².

    λ_c is the mean probability that the class embeddings give the photos of a class, so that
    classes whose names are understood are held the most (eq. 11). As in the authors' code, the
    penalty is the mean over the classes. Theirs also trains on twenty augmented copies of each
    photo.
    """

    def fit(self, task: RowTask) -> None:
        """Train the rows by SGD."""
        rows = nn.Parameter(task.texts.clone())
        known = (task.scale * task.images @ task.texts.T).softmax(dim=1)
        right = known.gather(1, task.labels[:, None]).squeeze(1)
        shots = task.labels.bincount(minlength=len(rows))
        multipliers = torch.zeros(len(rows)).to(right).index_add_(0, task.labels, right) / shots
        optimizer = torch.optim.SGD([rows], _RATE, momentum=0.9, weight_decay=0.0005)

        def logits(images: Tensor) -> tuple[Tensor, Tensor]:
            unit = functional.normalize(rows, dim=-1)
            return task.scale * images @ unit.T, unit

        def penalty() -> Tensor:
            return (multipliers * (rows - task.texts).square().sum(dim=1)).mean()

        batches = -(-len(task.labels) // _BATCH_SIZE)
        schedule = Schedule(_BATCH_SIZE, _EPOCHS * batches, warmup_epochs=1)
        minimise(optimizer, logits, task, schedule, penalty)
        self.weight.copy_(functional.normalize(rows.detach(), dim=-1))
