"""Collapse everything learned on the text side into one row per class (METHOD 9)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from capt_train.run import TunedModel


@dataclass(frozen=True)
class Head:
    """The linear layer that is left of the text side: `z = f(x)·Wᵀ + b`."""

    weight: Float[Tensor, "classes dim"]  # W_c = scale/T · t_c, never renormalised
    bias: Float[Tensor, " classes"]


def fold(model: TunedModel) -> Head:
    """Return the head whose logits equal the tuned model's calibrated ones."""
    return _head(model.backbone.scale / model.fitted.temperature, model.text_embeddings)


def fold_zero_shot(model: TunedModel) -> Head:
    """Return the head of the frozen model with the hand-written prompt, calibrated likewise."""
    return _head(model.backbone.scale / model.fitted.zero_shot_temperature, model.zero_shot)


def _head(scale: float, embeddings: Float[Tensor, "classes dim"]) -> Head:
    weight = scale * embeddings
    return Head(weight, weight.new_zeros(len(weight)))
