"""CoCoOp (arXiv 2203.05557): a context that each image shifts."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capt_train.method.base import BuildContext, ClassPrompt
from capt_train.method.prompt import PromptLearner

_NARROWER = 16  # the hidden layer has a sixteenth of the image embedding's width


class ImagePrompt(PromptLearner):
    """`v_m(x) = v_m + π, π = h_θ(f(x))`, section 3.2: a small network shifts all vectors alike.

    Every image needs the embeddings of all classes, so it cannot be folded into class rows.
    """

    reads_images = True

    def __init__(self, context: BuildContext) -> None:
        super().__init__(
            context.backbone,
            context.class_names,
            context.tuned,
            replace(context.config.prompt, depth=1),
            context.generator,
        )
        dim, width = context.zero_shot.shape[1], self.context.shape[-1]
        hidden = max(1, dim // _NARROWER)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.config.seed)
            layers = nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, width)
        self.network = nn.Sequential(*layers)

    @classmethod
    def build(cls, context: BuildContext) -> Sequence[ClassPrompt]:
        """Return the prompt before the first step."""
        return [cls(context)]

    def forward(
        self, classes: Sequence[int], images: Float[Tensor, "batch dim"] | None = None
    ) -> Float[Tensor, "*batch classes dim"]:
        """Return class embeddings for each image; without images those of the unshifted context."""
        if images is None:
            return super().forward(classes)
        shifted = self.context + self.network(images)[:, None]  # (batch, context, width)
        tokens = self._tokens[list(classes)]
        contexts = shifted.repeat_interleave(len(tokens), dim=0)
        texts = self._backbone.text.encode(tokens.repeat(len(images), 1), contexts)
        return texts.view(len(images), len(tokens), -1)
