"""Collapse everything learned on the text side into one row per class (METHOD 9)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from capt_deploy.confidence.vector_scaling import VectorScaling
from capt_train.clip.backbone import Backbone


@dataclass(frozen=True)
class Head:
    """The linear layer that is left of the text side: `z = f(x)·Wᵀ + b`."""

    weight: Float[Tensor, "classes dim"]  # W_c = scale/T · Ŵ_c, never renormalised
    bias: Float[Tensor, " classes"]

    def cooled(self, factor: float) -> "Head":
        """Return the head with its temperature multiplied by `factor`."""
        return Head(self.weight / factor, self.bias / factor)

    def scaled(self, vector: VectorScaling, temperature: float) -> "Head":
        """Return the head of (a·z + b)/T, this one being that of z/T."""
        scales, biases = map(self.bias.new_tensor, (vector.scales, vector.biases))
        return Head(self.weight * scales[:, None], self.bias * scales + biases / temperature)


def folded(backbone: Backbone, rows: Float[Tensor, "classes dim"], temperature: float) -> Head:
    """Return the head whose logits equal the model's calibrated ones.

    Args:
        backbone: knows scale and, where it was trained with a sigmoid, bias of the logits.
        rows: Ŵ_c, or t⁰_c.
        temperature: T.
    """
    weight = backbone.scale / temperature * rows.cpu()
    return Head(weight, weight.new_full((len(weight),), backbone.logit_bias / temperature))
