"""The terms of the loss as functions of one step's tensors, and their weighted sum.

`capt_train.parts` lists each term with its part and default weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capt_train import parts
from capt_train.method import losses


@dataclass(frozen=True)
class Retrieved:
    """Confused samples of the bank that join a minibatch in its contrast alone (METHOD 4, 6)."""

    logits: Float[Tensor, "prompts samples classes"]  # scaled
    labels: Int[Tensor, " samples"]
    mined: Int[Tensor, "samples mined"]


@dataclass(frozen=True)
class Step:
    """The tensors of a minibatch."""

    logits: Float[Tensor, "prompts batch classes"]  # scaled
    labels: Int[Tensor, " batch"]
    scale: float  # 1/τ of the logits
    # t̃, unit norm, where tuned: of each prompt, or of each image where the prompt reads images
    texts: Float[Tensor, "sets classes dim"] | None = None
    reference: Float[Tensor, "classes dim"] | None = None  # t⁰, beside `texts`
    mined: Int[Tensor, "batch mined"] | None = None  # classes confused with each image
    retrieved: Retrieved | None = None
    images: Float[Tensor, "batch dim"] | None = None  # f
    frozen: Float[Tensor, "batch dim"] | None = None  # f⁰ of the same views
    gates: tuple[Tensor, ...] = ()  # (rows, experts) of each router
    label_noise: float = 0.0  # ε, the share of wrong labels
    targets: Float[Tensor, "batch classes"] | None = None  # probabilities by a teacher
    classes: int | None = None  # their number where `logits` are of some that stand for all

    def with_retrieved(self, size: int) -> "Step":
        """Return the step of the first `size` images; those after them join the contrast alone."""
        if self.mined is None or size == len(self.labels):
            return self
        retrieved = Retrieved(self.logits[:, size:], self.labels[size:], self.mined[size:])
        return replace(
            self,
            logits=self.logits[:, :size],
            labels=self.labels[:size],
            mined=self.mined[:size],
            retrieved=retrieved,
            images=None if self.images is None else self.images[:size],
            frozen=None if self.frozen is None else self.frozen[:size],
            targets=None if self.targets is None else self.targets[:size],
        )

    def mean_over_prompts(self, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the mean over the prompts of a term of logits and labels."""
        return torch.stack([term(logits, self.labels) for logits in self.logits]).mean()


def cross_entropy(step: Step) -> Tensor:
    """Return the cross-entropy, corrected for label noise."""
    share, classes = step.label_noise, step.classes
    return step.mean_over_prompts(lambda z, y: losses.noisy_cross_entropy(z, y, share, classes))


def coa(step: Step) -> Tensor:
    """Return the confusion-aware loss."""
    return step.mean_over_prompts(losses.confusion_aware)


def infonce(step: Step) -> Tensor | None:
    """Return the confusion-restricted InfoNCE; None where nothing is mined."""
    if step.mined is None:
        return None
    logits, labels, mined, share = step.logits, step.labels, step.mined, step.label_noise
    if (retrieved := step.retrieved) is not None:
        logits = torch.cat([logits, retrieved.logits], dim=1)
        labels = torch.cat([labels, retrieved.labels])
        mined = torch.cat([mined, retrieved.mined])

    def term(scores: Tensor) -> Tensor:
        # the gradient of the noisy cross-entropy has the same weights
        right = None
        if share:
            right = losses.right_probabilities(scores.detach(), labels, share, step.classes)
        return losses.confusion_infonce(scores, labels, mined, right)

    return torch.stack([term(scores) for scores in logits]).mean()


def margin(step: Step) -> Tensor:
    """Return the margin term."""
    return step.mean_over_prompts(lambda z, y: losses.margin(z, y, step.scale))


def moments(step: Step) -> Tensor | None:
    """Return the moment term, the mean over the prompts; None where the text side is fixed."""
    if step.texts is None or step.reference is None:
        return None
    reference = step.reference
    return torch.stack([losses.moments(texts, reference) for texts in step.texts]).mean()


def consistency(step: Step) -> Tensor | None:
    """Return 1 − cos(f, f⁰); None without images."""
    if step.images is None or step.frozen is None:
        return None
    return losses.consistency(step.images, step.frozen)


def balance(step: Step) -> Tensor | None:
    """Return the sum of the routers' importance losses; None without a router."""
    if not step.gates:
        return None
    return torch.stack([losses.balance(gates) for gates in step.gates]).sum()


def loss_terms(step: Step, weights: Mapping[str, float]) -> dict[str, Float[Tensor, ""]]:
    """Return the unweighted terms that have a weight and whose tensors exist."""
    terms = {
        name: parts.load(term.code)(step)
        for name, term in parts.loss_terms().items()
        if weights.get(name)
    }
    return {name: value for name, value in terms.items() if value is not None}


def weighted_sum(
    terms: Mapping[str, Float[Tensor, ""]], weights: Mapping[str, float]
) -> Float[Tensor, ""]:
    """Return the loss that is minimised."""
    return torch.stack([weights[name] * value for name, value in terms.items()]).sum()
