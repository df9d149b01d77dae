"""ProGrad (arXiv 2205.14865): no step against what the hand-written prompt knows.

The gradient of the loss is projected by `capt_train.tune.precision.project`.
"""

from torch import Tensor

from capt_train.method.loss_terms import Step
from capt_train.method.losses import wide


def general_knowledge(step: Step) -> Tensor:
    """Return KL(p_zs ‖ p) up to a constant, eq. 3: the mean of −Σ_c p_zs(c)·log p(c).

    The temperature is 1, as in the authors' code, which starts from 16 vectors, the last of them
    words; here the context starts from the words alone.
    """
    known = zero_shot_logits(step).softmax(dim=1)
    return step.mean_over_prompts(lambda z, _: -(known * wide(z).log_softmax(dim=1)).sum(1).mean())


def zero_shot_logits(step: Step) -> Tensor:
    """Return the scaled logits of the hand-written prompt for the frozen embeddings of a step.

    Raises:
        ValueError: the step has no text side.
    """
    if step.frozen is None or step.reference is None:
        raise ValueError("expected a step with frozen embeddings and hand-written ones")
    return step.scale * wide(step.frozen) @ wide(step.reference).T
