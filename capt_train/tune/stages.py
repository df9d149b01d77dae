"""What is tuned on, and in which stages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Bool, Float
from torch import Tensor

from capt_train.config import TrainConfig
from capt_train.confusion.bank import ConfusionBank
from capt_train.data.features import Features
from capt_train.method.learner import Learner
from capt_train.tune.views import Views


@dataclass(frozen=True)
class TuningTask:
    """What is tuned on, apart from the learner itself."""

    scale: float  # 1/τ of the backbone
    tuned: tuple[int, ...]  # indices of the classes that are tuned, ascending
    train: Features  # images of these classes
    val: Features  # likewise; may be empty
    reference: Float[Tensor, "classes dim"]  # hand-written t⁰ of these classes
    config: TrainConfig
    bank: ConfusionBank | None = None  # as the hand-written prompt fills it, colours mapped
    views: Views | None = None  # of the training images
    val_tokens: Float[Tensor, "images tokens width"] | None = None
    alpha: Float[Tensor, " samples"] | None = None  # s·cᵞ of the training images


def zero_shot_bank(
    scale: float,
    train: Features,
    tuned: Sequence[int],
    reference: Float[Tensor, "classes dim"],
) -> ConfusionBank:
    """Return the bank as the frozen model fills it, over the classes that are tuned.

    Args:
        scale: 1/τ of the backbone.
        train: images of these classes.
        tuned: their indices, ascending.
        reference: their hand-written t⁰.
    """
    embeddings = train.embeddings.to(reference.device)
    labels = train.labels_among(tuned).to(reference.device)
    return ConfusionBank.fill(scale * embeddings @ reference.T, labels, embeddings)


def with_rows(task: TuningTask, chosen: Bool[Tensor, " samples"]) -> TuningTask:
    """Return the task with some of its training images; its bank is left as it is."""
    views = task.views
    if views is not None:
        tokens = None if views.tokens is None else views.tokens[:, chosen]
        views = Views(views.embeddings[:, chosen], views.untouched[chosen], tokens)
    rows = chosen.nonzero().squeeze(1)
    alpha = None if task.alpha is None else task.alpha[chosen]
    return replace(task, train=task.train.rows(rows), views=views, alpha=alpha)


def refilled(task: TuningTask) -> TuningTask:
    """Return the task with a bank of its own classes and images."""
    if task.bank is None:
        return task
    bank = zero_shot_bank(task.scale, task.train, task.tuned, task.reference)
    return replace(task, bank=bank)


TEXT = "text-"  # in front of the checkpoints of a text side that a visual one comes after


@dataclass(frozen=True)
class Stage:
    """One run of the loop: the text side alone, or both sides together."""

    name: str  # in front of its checkpoints' names; "" for the last one
    epochs: int
    text_rate: float  # peak learning rate of the text side
    visual_rate: float = 0.0  # of the visual side; 0 leaves it as it is
    consistency: float = 0.0  # weight of that term
    patience: int = 0

    @property
    def visual(self) -> bool:
        """Whether the visual side takes part."""
        return self.visual_rate > 0


def stages(task: TuningTask, learner: Learner) -> list[Stage]:
    """Return what is tuned after what (ours).

    The text side comes first, for its steps are cheap on cached embeddings, and the visual side
    then learns beside prompts that fit. That side first stays near the frozen one. Then it may
    move far; where that does not help on validation images, it is taken back, and where there are
    none, it is not tried.
    """
    tuning, visual = task.config.tuning, task.config.visual
    text = Stage("", tuning.epochs, tuning.learning_rate, patience=tuning.patience)
    if learner.visual is None:
        return [text] if learner.text_parameters else []
    slower = tuning.learning_rate * visual.text_rate
    near = Stage("", visual.epochs, slower, visual.learning_rate, visual.consistency)
    far = replace(
        near,
        epochs=visual.far_epochs,
        consistency=visual.far_consistency,
        patience=visual.far_patience,
    )
    order = [replace(text, name=TEXT)] if learner.text_parameters else []
    if not len(task.val) or not visual.far_epochs:
        return [*order, near]
    return [*order, replace(near, name="near-"), far]
