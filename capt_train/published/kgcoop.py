"""KgCoOp (arXiv 2303.13283): tuned class embeddings stay near the hand-written ones."""

from torch import Tensor

from capt_train.method.loss_terms import Step


def distance(step: Step) -> Tensor | None:
    """Return the mean of ‖t_c − t⁰_c‖² over prompts and classes, eq. 3; None without texts.

    The authors' code has 1 − cos(t_c, t⁰_c), which is half of it, with the same weight of 8.
    """
    if step.texts is None or step.reference is None:
        return None
    return (step.texts - step.reference).square().sum(dim=-1).mean()
