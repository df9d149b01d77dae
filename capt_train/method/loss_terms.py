"""One step's tensors, the named terms that they give, and their weighted sum."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capt_train.method import losses


@dataclass(frozen=True)
class Step:
    """What a minibatch gives, per learned prompt where that makes a difference."""

    logits: Float[Tensor, "prompts batch classes"]  # scaled
    labels: Int[Tensor, " batch"]
    texts: Float[Tensor, "prompts classes dim"]  # t̃, unit norm
    reference: Float[Tensor, "classes dim"]  # t⁰
    mined: Int[Tensor, "batch mined"] | None = None  # classes confused with each image
    images: Float[Tensor, "batch dim"] | None = None  # f, where the visual side is tuned
    frozen: Float[Tensor, "batch dim"] | None = None  # f⁰ of the same views
    gates: tuple[Tensor, ...] = ()  # (rows, experts) of each router
    label_noise: float = 0.0  # ε, the share of wrong labels


def _per_prompt(term: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Step], Tensor]:
    """Return the mean over the learned prompts, each of which shall be good alone."""
    return lambda step: torch.stack([term(own, step.labels) for own in step.logits]).mean()


def _cross_entropy(step: Step) -> Tensor:
    share = step.label_noise
    return _per_prompt(lambda own, labels: losses.noisy_cross_entropy(own, labels, share))(step)


def _infonce(step: Step) -> Tensor | None:
    if step.mined is None:
        return None
    mined, share = step.mined, step.label_noise

    def term(own: Tensor, labels: Tensor) -> Tensor:
        # as in the cross-entropy of such labels, but there it is a part of the gradient
        right = losses.right_probabilities(own.detach(), labels, share) if share else None
        return losses.confusion_infonce(own, labels, mined, right)

    return _per_prompt(term)(step)


def _moments(step: Step) -> Tensor:
    return torch.stack([losses.moments(own, step.reference) for own in step.texts]).mean()


def _consistency(step: Step) -> Tensor | None:
    if step.images is None or step.frozen is None:
        return None
    return losses.consistency(step.images, step.frozen)


def _balance(step: Step) -> Tensor | None:
    if not step.gates:
        return None
    return torch.stack([losses.balance(gates) for gates in step.gates]).sum()


_TERMS: dict[str, Callable[[Step], Tensor | None]] = {
    "cross_entropy": _cross_entropy,
    "coa": _per_prompt(losses.confusion_aware),
    "infonce": _infonce,
    "margin": _per_prompt(losses.margin),
    "moments": _moments,
    "consistency": _consistency,
    "balance": _balance,
}


def loss_terms(step: Step, weights: Mapping[str, float]) -> dict[str, Float[Tensor, ""]]:
    """Return the unweighted terms that have a weight and whose tensors are there."""
    found = {name: term(step) for name, term in _TERMS.items() if weights.get(name)}
    return {name: value for name, value in found.items() if value is not None}


def weighted_sum(
    terms: Mapping[str, Float[Tensor, ""]], weights: Mapping[str, float]
) -> Float[Tensor, ""]:
    """Return the one number that is minimised."""
    return torch.stack([weights[name] * value for name, value in terms.items()]).sum()
