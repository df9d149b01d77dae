"""Fold everything learned on the text side into one row per class (METHOD 9)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from capt_deploy.confidence.calibration import Calibration
from capt_train.clip.backbone import Backbone
from capt_train.method.class_rows import ClassRows


@dataclass(frozen=True)
class FoldedHead:
    """A linear layer in place of the text side: `z = f(x)·Wᵀ + b`."""

    weight: Float[Tensor, "classes dim"]  # W_c = scale/T · Ŵ_c, never renormalised
    bias: Float[Tensor, " classes"]

    def with_temperature_times(self, factor: float) -> "FoldedHead":
        """Return the head with its temperature multiplied by `factor`."""
        return FoldedHead(self.weight / factor, self.bias / factor)


def fold(backbone: Backbone, rows: ClassRows, calibration: Calibration) -> FoldedHead:
    """Return the head whose logits equal the model's, scaled as `Calibration.scale` does it.

    Args:
        backbone: has the scale and, if it was trained with a sigmoid, the bias of the logits.
        rows: Ŵ_c and b_c, or t⁰_c and zeros.
        calibration: its temperature and vector scaling are folded.
    """
    temperature, vector = calibration.temperature, calibration.vector
    weight = backbone.scale / temperature * rows.rows.cpu()
    bias = (rows.biases.cpu() + backbone.logit_bias) / temperature
    if vector is None:
        return FoldedHead(weight, bias)
    scales, biases = map(bias.new_tensor, (vector.scales, vector.biases))
    return FoldedHead(weight * scales[:, None], bias * scales + biases / temperature)
