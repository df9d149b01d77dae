"""Train rows on cached image embeddings, with whatever loss terms are in force."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from capt_deploy.core.errors import RunError
from capt_train.method.class_rows import RowTask
from capt_train.method.loss_terms import Step, loss_terms, weighted_sum
from capt_train.tune.epochs import learning_rate


@dataclass(frozen=True)
class Schedule:
    """How long rows are trained, and how the rate changes: a half cosine to 0."""

    batch_size: int
    steps: int  # of the optimizer
    warmup_epochs: int = 0  # at a rate of 1e-5


def minimise(
    optimizer: torch.optim.Optimizer,
    logits: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    task: RowTask,
    schedule: Schedule,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Minimise the weighted loss terms by minibatches.

    Args:
        optimizer: of the rows.
        logits: returns scaled logits of images, and the rows as class embeddings for the terms
            that act on these.
        task: images, labels and weights of the terms.
        schedule: how long.
        penalty: added to the loss.

    Raises:
        RunError: the loss is not finite.
    """
    draw = torch.Generator().manual_seed(task.seed)
    peak = float(optimizer.param_groups[0]["lr"])
    batches = -(-len(task.labels) // schedule.batch_size)
    warmup = schedule.warmup_epochs * batches
    with torch.enable_grad():
        for number in range(schedule.steps):
            if number % batches == 0:
                order = torch.randperm(len(task.labels), generator=draw)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(number, schedule.steps, warmup, peak, 1e-5)
            rows = order[number % batches :: batches]
            images = task.images[rows]
            scores, texts = logits(images)
            step = Step(
                scores[None],
                task.labels[rows],
                task.scale,
                None if texts is None else texts[None],
                task.reference,
                images=images,
                frozen=images,
            )
            loss = weighted_sum(loss_terms(step, task.weights), task.weights)
            if penalty is not None:
                loss = loss + penalty()
            if not torch.isfinite(loss):
                raise RunError(f"training of rows: the loss became {loss.item()} in step {number}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
