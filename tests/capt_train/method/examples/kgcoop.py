"""KgCoOp (arXiv 2303.13283): tuned class embeddings stay near the hand-written ones."""

from torch import Tensor

from capt_train.method.loss_terms import Step


def distance(step: Step) -> Tensor:
    """Return the mean of ‖t_c − t⁰_c‖² over prompts and classes."""
    return (step.texts - step.reference).square().sum(dim=-1).mean()
