"""PromptKD (arXiv 2403.02781): a student learns a teacher's answers to photos without labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from capt_deploy.core.errors import ConfigError
from capt_train.method.base import BuildContext, ClassPrompt
from capt_train.method.loss_terms import Step
from capt_train.method.losses import wide


class TeacherTexts(ClassPrompt):
    """`t_c = norm(t^T_c·P)`: the teacher's class embeddings t^T, projected to the student's space.

    As in PromptKD, student and teacher share the class embeddings, which cost the student no text
    tower, and a projector joins the two spaces. The authors' projector is a network of two layers
    behind the image embedding; here it is one matrix on the side of the classes, so that it folds:
    `f·(t·P) = (f·Pᵀ)·t` *(ours)*. It starts where it gives the hand-written embeddings of the
    student.
    """

    teacher: Tensor  # t^T, (classes, width)

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        zero_shot = context.zero_shot
        teacher = context.teacher
        if teacher is None:  # to be loaded over
            teacher = zero_shot.new_zeros(len(zero_shot), 0)
        self.register_buffer("teacher", teacher.detach().clone().to(zero_shot))
        start = torch.linalg.pinv(self.teacher.double()) @ zero_shot.double()
        self.projector = nn.Parameter(start.to(zero_shot))

    @classmethod
    def build(cls, context: BuildContext) -> Sequence[ClassPrompt]:
        """Return the prompt before the first step."""
        return [cls(context)]

    def forward(
        self, classes: Sequence[int], images: Float[Tensor, "batch dim"] | None = None
    ) -> Float[Tensor, "classes dim"]:
        """Return the unit-norm embeddings of some classes, given by index."""
        return functional.normalize(self.teacher[list(classes)] @ self.projector, dim=-1)

    def of_names(self, class_names: Sequence[str]) -> Float[Tensor, "classes dim"]:
        """Raise an error: the teacher is asked about the classes of the data set alone."""
        raise ConfigError(
            "a distilled run knows the classes of its data set alone; add the class names there "
            "and tune again"
        )

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        width = state[f"{prefix}teacher"].shape[1]
        if width != self.teacher.shape[1]:  # not known without the teacher
            self.teacher = self.teacher.new_zeros(len(self.teacher), width)
            self.projector = nn.Parameter(self.projector.new_zeros(width, self.projector.shape[1]))
        super()._load_from_state_dict(state, prefix, *rest)


def divergence(step: Step) -> Tensor | None:
    """Return KL(p_T ‖ p), divided by the number of classes, eq. 5; None without a teacher.

    The temperature is 1 and the default weight 1000, as in the authors' code.
    """
    if step.targets is None:
        return None
    targets = wide(step.targets)
    entropy = torch.xlogy(targets, targets)

    def term(logits: Tensor, _: Tensor) -> Tensor:
        return (entropy - targets * wide(logits).log_softmax(dim=1)).mean()

    return step.mean_over_prompts(term)
