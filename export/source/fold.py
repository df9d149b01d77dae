"""Collapse everything learned on the text side into one row per class (METHOD 9)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from capt_deploy.confidence.calibration import Calibration
from capt_train.clip.backbone import Backbone


@dataclass(frozen=True)
class Head:
    """The linear layer that is left of the text side: `z = f(x)·Wᵀ + b`."""

    weight: Float[Tensor, "classes dim"]  # W_c = scale/T · Ŵ_c, never renormalised
    bias: Float[Tensor, " classes"]

    def cooled(self, factor: float) -> "Head":
        """Return the head with its temperature multiplied by `factor`."""
        return Head(self.weight / factor, self.bias / factor)


def folded(
    backbone: Backbone, rows: Float[Tensor, "classes dim"], calibration: Calibration
) -> Head:
    """Return the head whose logits equal the model's, scaled as `Calibration.scale` does it.

    Args:
        backbone: knows scale and, where it was trained with a sigmoid, bias of the logits.
        rows: Ŵ_c, or t⁰_c.
        calibration: its temperature and vector scaling are folded.
    """
    temperature, vector = calibration.temperature, calibration.vector
    weight = backbone.scale / temperature * rows.cpu()
    bias = weight.new_full((len(weight),), backbone.logit_bias / temperature)
    if vector is None:
        return Head(weight, bias)
    scales, biases = map(bias.new_tensor, (vector.scales, vector.biases))
    return Head(weight * scales[:, None], bias * scales + biases / temperature)
