"""PromptSRC (arXiv 2307.06948): deep prompts with three regularisers.

1. The prompted embeddings and logits stay near those of the frozen model: `text_distance`,
   `image_distance`, `logit_distance` (eq. 3 to 6).
2. The result is a mean of the prompts over the epochs with Gaussian weights (eq. 7).
3. The frozen class embeddings are means over many templates: `prompt.templates`.
"""

import math

from torch import Tensor

from capt_train.config import TrainConfig
from capt_train.method.loss_terms import Step
from capt_train.method.losses import wide
from capt_train.published.prograd import zero_shot_logits


def text_distance(step: Step) -> Tensor | None:
    """Return the mean of |t − t⁰| over all numbers of the class embeddings; None without texts.

    The paper sums over the numbers of an embedding; the authors' code, whose weight of 25 is the
    default, takes the mean.
    """
    if step.texts is None or step.reference is None:
        return None
    return (step.texts - step.reference).abs().mean()


def image_distance(step: Step) -> Tensor | None:
    """Return the mean of |f − f⁰| over all numbers; None where no visual side is tuned."""
    if step.images is None or step.frozen is None or step.images is step.frozen:
        return None
    return (wide(step.images) - step.frozen).abs().mean()


def logit_distance(step: Step) -> Tensor:
    """Return KL(p_zs ‖ p), divided by the number of classes.

    The paper writes the divergence the other way round; the authors' code has this one, with the
    mean over images and classes.
    """
    known = zero_shot_logits(step).log_softmax(dim=1)

    def divergence(logits: Tensor, _: Tensor) -> Tensor:
        return (known.exp() * (known - wide(logits).log_softmax(dim=1))).mean()

    return step.mean_over_prompts(divergence)


def gaussian(epoch: int, epochs: int, config: TrainConfig) -> float:
    """Return the weight of an epoch in the mean of the parameters.

    The authors' mean and standard deviation are 15 and 1 of 20 epochs where new classes count,
    and 30 and 30 of 50 epochs on all classes; other numbers of epochs have the same shares.

    Args:
        epoch: 1-based.
        epochs: in all.
        config: says whether new classes count.
    """
    mean, deviation = (0.75, 0.05) if config.classes == "base" else (0.6, 0.6)
    return math.exp(-0.5 * ((epoch / epochs - mean) / deviation) ** 2)
