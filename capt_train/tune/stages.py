"""What is tuned on, and the stages of a tuning."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capt_train.calibrate.label_noise import fit_label_noise
from capt_train.config import TrainConfig
from capt_train.confusion.bank import ConfusionBank
from capt_train.data.features import Features
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

    @property
    def labels(self) -> Int[Tensor, " samples"]:
        """Return the classes of the training images as positions among the tuned ones."""
        return self.train.labels_among(self.tuned)

    @cached_property
    def label_noise(self) -> float:
        """Return ε: as set, else estimated from the frozen model's logits of the training images."""
        fixed = self.config.tuning.label_noise
        if fixed is not None:
            return fixed
        device = self.reference.device
        logits = self.scale * self.train.embeddings.to(device) @ self.reference.T
        return fit_label_noise(logits, self.labels.to(device)).share

    def among(self, inside: Bool[Tensor, " classes"]) -> "TuningTask":
        """Return the task with some of its classes and an unchanged bank."""
        classes = tuple(c for c, chosen in zip(self.tuned, inside.tolist(), strict=True) if chosen)
        indices = torch.tensor(classes)
        val = torch.isin(self.val.labels, indices)
        return replace(
            self.with_rows(torch.isin(self.train.labels, indices)),
            tuned=classes,
            val=self.val.rows(val.nonzero().squeeze(1)),
            val_tokens=None if self.val_tokens is None else self.val_tokens[val],
            reference=self.reference[inside.nonzero().squeeze(1).to(self.reference.device)],
        )

    def with_rows(self, chosen: Bool[Tensor, " samples"]) -> "TuningTask":
        """Return the task with some of its training images and an unchanged bank."""
        views = None if self.views is None else self.views.with_rows(chosen)
        alpha = None if self.alpha is None else self.alpha[chosen]
        train = self.train.rows(chosen.nonzero().squeeze(1))
        return replace(self, train=train, views=views, alpha=alpha)

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
    """One run of the training loop: the text side alone, or both sides together."""

    name: str  # prefix of its checkpoints' names; "" for the last stage
    epochs: int
    text_rate: float  # peak learning rate of the text side
    visual_rate: float = 0.0  # of the visual side; 0 leaves it unchanged
    consistency: float = 0.0  # weight of the consistency term
    patience: int = 0
    batch_size: int = 1024

    @property
    def visual(self) -> bool:
        """Tell whether the visual side is trained."""
        return self.visual_rate > 0


def text_stage(task: TuningTask) -> Stage:
    """Return the stage that trains what the text side has to train by epochs."""
    tuning = task.config.tuning
    return Stage(
        "",
        tuning.epochs,
        tuning.learning_rate,
        patience=tuning.patience,
        batch_size=tuning.batch_size,
    )


def stages(task: TuningTask, learner: Learner) -> list[Stage]:
    """Return the stages of a tuning in order (ours).

    The text side comes first, because its steps are cheap on cached embeddings; the visual side
    then learns beside prompts that fit. It first stays near the frozen tower (a strong consistency
    term), then may move further. That second visual stage is kept only where validation images
    gain, and not tried where there are none.
    """
    tuning, visual = task.config.tuning, task.config.visual
    text = text_stage(task)
    if learner.visual is None:
        return [text] if learner.text_parameters else []
    text_rate = tuning.learning_rate * visual.text_rate
    near = Stage(
        "",
        visual.epochs,
        text_rate,
        visual.learning_rate,
        visual.consistency,
        batch_size=visual.batch_size,
    )
    far = replace(
        near,
        epochs=visual.far_epochs,
        consistency=visual.far_consistency,
        patience=visual.far_patience,
    )
    first = [replace(text, name=TEXT)] if learner.text_parameters else []
    if not len(task.val) or not visual.far_epochs:
        return [*first, near]
    return [*first, replace(near, name="near-"), far]
