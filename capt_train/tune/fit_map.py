"""Fit the linear map of class embeddings by L-BFGS on cached image embeddings (METHOD 5b)."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from capt_deploy.core.errors import RunError
from capt_train.confusion.bank import mined_classes
from capt_train.method.class_map import IMAGES, mapped
from capt_train.method.loss_terms import Step, loss_terms, weighted_sum
from capt_train.tune.stages import TuningTask

RIDGES = (0.1, 0.03, 0.01, 0.003, 0.001)
_STEPS = 40  # of L-BFGS, at most
_AT_ONCE = 256  # images; the contrast compares each with all others
_DRAWN = 2000  # classes that images are told from beside their own; bounds time and memory
_UNIT = 10.0  # scale at which the ridge is the plain squared norm


@dataclass(frozen=True)
class MapTask:
    """Class embeddings, images and losses that a map is fitted with."""

    scale: float  # 1/τ
    texts: Float[Tensor, "prompts classes dim"]  # t before the map, unit norm
    images: Float[Tensor, "samples dim"]  # unit norm
    labels: Int[Tensor, " samples"]  # positions among the classes
    mined: Int[Tensor, "samples mined"] | None  # classes confused with each image
    reference: Float[Tensor, "classes dim"]  # t⁰
    weights: Mapping[str, float]  # of the loss terms
    label_noise: float = 0.0
    seed: int = 0  # of the classes that are drawn of many


def map_task(task: TuningTask, texts: Float[Tensor, "prompts classes dim"]) -> MapTask:
    """Return the task of fitting a map behind the class embeddings `texts` of a tuning."""
    device, config = task.reference.device, task.config
    mined = None if task.bank is None else mined_classes(task.bank, config.confusion.pairs)
    return MapTask(
        task.scale,
        texts,
        task.train.embeddings.to(device),
        task.labels.to(device),
        mined,
        task.reference,
        config.loss_weights,
        task.label_noise,
        config.seed,
    )


def fit_maps(
    task: MapTask, side: str, ridges: Collection[float]
) -> dict[float, Float[Tensor, "dim dim"]]:
    """Return the map of each ridge.

    Each starts from that of the next stronger one of `RIDGES`, so that it depends on no other than
    its own ridge.

    Raises:
        RunError: a map is not finite.
    """
    matrices: dict[float, Tensor] = {}
    start = None
    for ridge in sorted({*ridges, *(ridge for ridge in RIDGES if ridge > min(ridges))})[::-1]:
        matrices[ridge] = fit_map(task, side, ridge, start)
        start = matrices[ridge] if ridge in RIDGES else start
    return {ridge: matrices[ridge] for ridge in ridges}


def fit_map(
    task: MapTask,
    side: str,
    ridge: float,
    start: Float[Tensor, "dim dim"] | None = None,
    steps: int = _STEPS,
) -> Float[Tensor, "dim dim"]:
    """Return the A that minimises the weighted loss terms plus `ridge·(scale/10)²·‖A‖_F²`.

    The penalty is in logits, so that a ridge means the same for every model: `scale·f·tA` is what A
    adds to a logit. Minimised by L-BFGS over all images at once, which has no rate to choose. Of
    more than 2000 classes beside those of the images and the mined ones, see `_columns`.

    Args:
        task: classes, images and losses.
        side: whose norm is restored behind the map while it is fitted, `images` or `classes`.
        ridge: at least 0.
        start: a matrix to start from; by default zeros.
        steps: of L-BFGS, at most.

    Raises:
        RunError: the map is not finite.
    """
    dim = task.images.shape[1]
    matrix = torch.zeros(dim, dim).to(task.images) if start is None else start.clone()
    matrix.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [matrix],
        max_iter=steps,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    samples = len(task.labels)
    count = -(-samples // _AT_ONCE)
    draw = torch.Generator().manual_seed(task.seed)
    parts = []
    for first in range(count):
        rows = torch.arange(first, samples, count)
        parts.append((rows, *_columns(task, rows, draw)))
    penalty = ridge * (task.scale / _UNIT) ** 2

    def loss() -> float:
        optimizer.zero_grad()
        total = 0.0
        for rows, columns, offsets in parts:
            step = _step(task, side, matrix, rows, columns, offsets)
            terms = loss_terms(step, task.weights)
            share = weighted_sum(terms, task.weights) * (len(rows) / samples)
            share.backward()
            total += float(share.detach())
        squared = penalty * matrix.square().sum()
        squared.backward()
        return total + float(squared.detach())

    with torch.enable_grad():
        optimizer.step(loss)
    if not matrix.isfinite().all():
        raise RunError(f"the map became nan (map.ridge {ridge:g}); raise map.ridge and tune again")
    return matrix.detach()


def _columns(
    task: MapTask, rows: Int[Tensor, " batch"], draw: torch.Generator
) -> tuple[Int[Tensor, " columns"], Float[Tensor, " columns"]]:
    """Return the classes that images are told from, ascending, and what is added to their logits.

    Those of the images and those that are mined for them are always there. Of more than 2000
    others, that many are drawn, and each stands for w of them by log w on its logit: the sampled
    softmax of arXiv 1412.2007. So a fit takes as long for each image however many classes there
    are. Sums over classes are right on average. What reads single logits is not: the margin term
    takes its rival among the classes that are there, those drawn with log w.
    """
    needed = torch.zeros(task.texts.shape[1], dtype=torch.bool)
    needed[task.labels[rows].cpu()] = True
    if task.mined is not None:
        needed[task.mined[rows].flatten().cpu()] = True
    others = (~needed).nonzero().squeeze(1)
    offsets = torch.zeros(len(needed))
    if len(others) > _DRAWN:
        drawn = others[torch.randperm(len(others), generator=draw)[:_DRAWN]]
        offsets[drawn] = math.log(len(others) / _DRAWN)
        others = drawn
    needed[others] = True
    columns = needed.nonzero().squeeze(1)
    return columns.to(task.labels.device), offsets[columns].to(task.texts)


def _step(
    task: MapTask, side: str, matrix: Tensor, rows: Tensor, columns: Tensor, offsets: Tensor
) -> Step:
    images, before = task.images[rows], task.texts[:, columns]
    texts = mapped(before, matrix)
    if side == IMAGES:
        moved = functional.normalize(images + images @ matrix.T, dim=-1)
        logits = torch.einsum("bd,pcd->pbc", moved, before)
    else:
        logits = torch.einsum("bd,pcd->pbc", images, texts)
    return Step(
        task.scale * logits + offsets,
        torch.searchsorted(columns, task.labels[rows]),
        task.scale,
        texts,
        task.reference[columns],
        None if task.mined is None else torch.searchsorted(columns, task.mined[rows]),
        label_noise=task.label_noise,
        classes=task.texts.shape[1],
    )
