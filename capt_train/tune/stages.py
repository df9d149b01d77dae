"""The task of a tuning and its two stages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capt_train.config import TrainConfig
from capt_train.confusion.bank import ConfusionBank
from capt_train.data.features import Features
from capt_train.method.class_rows import ClassRows
from capt_train.method.learner import Learner
from capt_train.tune.views import Views

TEXT = "text-"  # prefix of the text side's checkpoints where a visual stage follows


@dataclass(frozen=True)
class TuningTask:
    """Images, classes and settings of a tuning; everything but the learner."""

    scale: float  # 1/τ of the backbone
    tuned: tuple[int, ...]  # indices of the tuned classes, ascending
    train: Features  # images of these classes
    val: Features  # images of these classes; may be empty
    reference: Float[Tensor, "classes dim"]  # hand-written t⁰ of these classes
    config: TrainConfig
    bank: ConfusionBank | None = None  # filled by the hand-written prompt, colours mapped
    views: Views | None = None  # of the training images
    val_tokens: Float[Tensor, "images tokens width"] | None = None
    alpha: Float[Tensor, " samples"] | None = None  # α = s·cᵞ of the training images
    class_rows: ClassRows | None = None  # of the tuned classes; the visual stage needs them
    label_noise: float = 0.0  # ε, the share of wrong labels
    targets: Float[Tensor, "samples classes"] | None = None  # probabilities by a teacher

    @property
    def labels(self) -> Int[Tensor, " samples"]:
        """Return the classes of the training images as positions among the tuned ones."""
        return self.train.labels_among(self.tuned)

    def among(self, inside: Bool[Tensor, " classes"]) -> "TuningTask":
        """Return the task with some of its classes and an unchanged bank."""
        places = inside.nonzero().squeeze(1).tolist()
        classes = tuple(self.tuned[place] for place in places)
        indices = torch.tensor(classes)
        val = torch.isin(self.val.labels, indices)
        return replace(
            self.with_rows(torch.isin(self.train.labels, indices)),
            tuned=classes,
            val=self.val.rows(val.nonzero().squeeze(1)),
            val_tokens=None if self.val_tokens is None else self.val_tokens[val],
            reference=self.reference[places],
            class_rows=None if self.class_rows is None else self.class_rows.subset(places),
        )

    def with_rows(self, chosen: Bool[Tensor, " samples"]) -> "TuningTask":
        """Return the task with some of its training images and an unchanged bank."""
        views = None if self.views is None else self.views.with_rows(chosen)
        alpha = None if self.alpha is None else self.alpha[chosen]
        targets = None if self.targets is None else self.targets[chosen]
        train = self.train.rows(chosen.nonzero().squeeze(1))
        return replace(self, train=train, views=views, alpha=alpha, targets=targets)

    def with_new_bank(self) -> "TuningTask":
        """Return the task with a bank filled from its own classes and images, if it has a bank."""
        if self.bank is None:
            return self
        bank = zero_shot_bank(self.scale, self.train, self.tuned, self.reference)
        return replace(self, bank=bank)


def zero_shot_bank(
    scale: float,
    train: Features,
    tuned: Sequence[int],
    reference: Float[Tensor, "classes dim"],
) -> ConfusionBank:
    """Return the bank as the frozen model fills it, over the tuned classes.

    Args:
        scale: 1/τ of the backbone.
        train: images of these classes.
        tuned: their indices, ascending.
        reference: their hand-written t⁰.
    """
    embeddings = train.embeddings.to(reference.device)
    labels = train.labels_among(tuned).to(reference.device)
    return ConfusionBank.fill(scale * embeddings @ reference.T, labels, embeddings)


@dataclass(frozen=True)
class Stage:
    """One run of the training loop, which trains one side of the learner."""

    name: str  # prefix of its checkpoints' names
    text: bool  # whether it trains the text side
    visual: bool  # whether it trains the visual side; without `text`, against fixed class rows
    epochs: int
    rate: float  # peak learning rate
    batch_size: int
    patience: int = 0
    consistency: float = 0.0  # weight of the consistency term


def text_stage(task: TuningTask, learner: Learner) -> Stage | None:
    """Return the stage of the text side, or with `visual.joint` of both; None without any."""
    tuning = task.config.tuning
    joint = task.config.visual.joint and learner.visual is not None
    if not (learner.text_parameters or joint):
        return None
    epochs = tuning.epochs
    if tuning.most_steps is not None:
        batches = -(-len(task.train) // tuning.batch_size)
        epochs = min(epochs, -(-tuning.most_steps // batches))
    return Stage(
        text_prefix(task.config, learner),
        bool(learner.text_parameters),
        joint,
        epochs,
        tuning.learning_rate,
        tuning.batch_size,
        tuning.patience,
    )


def text_prefix(config: TrainConfig, learner: Learner) -> str:
    """Return the prefix of the text side's checkpoints; empty where no visual stage follows."""
    return "" if learner.tuner is None or config.visual.joint else TEXT


def visual_stage(config: TrainConfig) -> Stage:
    """Return the stage of the visual side, which follows that of the text side (ours).

    The class rows no longer change, as with CAPT's authors: they are computed once, no step runs
    the text tower, and a visual side of any strength is compared with the same text side.
    """
    visual = config.visual
    return Stage(
        "",
        False,
        True,
        visual.epochs,
        visual.learning_rate,
        visual.batch_size,
        visual.patience,
        visual.consistency,
    )
