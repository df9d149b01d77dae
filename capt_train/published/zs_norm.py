"""ZS-Norm (arXiv 2407.13588): logits in the range of the zero-shot ones while tuning."""

from torch import Tensor

from capt_train.method.loss_terms import Step
from capt_train.method.losses import cross_entropy, wide
from capt_train.published.prograd import zero_shot_logits


def normalised(logits: Tensor, known: Tensor) -> Tensor:
    """Return logits moved and scaled to the range of other logits of the same image.

    `z' = (max z⁰ − min z⁰)/(max z − min z)·(z − min z) + min z⁰`, eq. 7 and 8. At inference the
    same is called sample-adaptive logit scaling (SaLS).

    Args:
        logits: z, (images, classes).
        known: z⁰ of the hand-written prompt, (images, classes).
    """
    low, high = logits.amin(dim=1, keepdim=True), logits.amax(dim=1, keepdim=True)
    low0, high0 = known.amin(dim=1, keepdim=True), known.amax(dim=1, keepdim=True)
    return (high0 - low0) / (high - low).clamp(min=1e-6) * (logits - low) + low0


def normalised_cross_entropy(step: Step) -> Tensor:
    """Return the cross-entropy of the normalised logits."""
    known = zero_shot_logits(step)
    return step.mean_over_prompts(lambda z, y: cross_entropy(normalised(wide(z), known), y))
