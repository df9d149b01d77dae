"""The prompt learner (METHOD 1): context vectors in front of every class name."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capt_train.clip.backbone import Backbone
from capt_train.method.base import BuildContext, ClassPrompt
from capt_train.setting_groups import PromptSettings


class PromptLearner(ClassPrompt):
    """Learns v₁..v_M of t_c = norm(E_T([SOS] v₁..v_M [c] . [EOS])).

    Shared by all classes, as in CoOp (arXiv 2109.01134), or one context per class. A class the
    prompt was not tuned on then takes the mean of the tuned contexts (ours).
    """

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        tuned: Sequence[int],
        settings: PromptSettings,
        generator: torch.Generator | None = None,
    ) -> None:
        """Create the context.

        Args:
            backbone: whose text tower is used; no submodule, because it never changes.
            class_names: every class whose embedding may be computed.
            tuned: the indices of those that are tuned.
            settings: start and form of the context; deeper vectors are shared by all classes.
            generator: for the random vectors.
        """
        super().__init__()
        self._backbone = backbone
        self._tuned = {index: row for row, index in enumerate(tuned)}
        if settings.random_tokens:
            width = backbone.text.vectors(backbone.tokens.words("a")).shape[1]
            start = 0.02 * torch.randn(settings.random_tokens, width, generator=generator)
        else:
            start = backbone.text.vectors(backbone.tokens.words(settings.words))
        if settings.class_specific:
            start = start.repeat(len(tuned), 1, 1)
        self.context = nn.Parameter(start.float().to(backbone.device))
        self.deeper: nn.Parameter | None = None
        depth = min(settings.depth, backbone.text.depth)
        if depth > 1:
            # The width of the random start is CoOp's.
            shape = (depth - 1, *self.context.shape[-2:])
            deeper = 0.02 * torch.randn(shape, generator=generator)
            self.deeper = nn.Parameter(deeper.to(backbone.device))
        self._tokens = self.tokenize(class_names)

    @classmethod
    def build(cls, context: BuildContext) -> Sequence[ClassPrompt]:
        """Return the K learned prompts; all but the first start a little off the words."""
        settings, prompts = prompt_settings(context), list[ClassPrompt]()
        for number in range(settings.count):
            prompt = cls(
                context.backbone, context.class_names, context.tuned, settings, context.generator
            )
            if number:
                noise = 0.02 * torch.randn(prompt.context.shape, generator=context.generator)
                prompt.context.data += noise.to(prompt.context.device)
            prompts.append(prompt)
        return prompts

    def forward(
        self, classes: Sequence[int], images: Float[Tensor, "batch dim"] | None = None
    ) -> Float[Tensor, "classes dim"]:
        """Return the unit-norm embeddings of some classes, given by index."""
        context = self.common_context
        if self.context.dim() == 3:
            rows = [self._tuned.get(index) for index in classes]
            context = torch.stack([context if row is None else self.context[row] for row in rows])
        tokens = self._tokens[list(classes)]
        return self._backbone.text.encode(tokens, context, self.deeper_context)

    def of_names(self, class_names: Sequence[str]) -> Float[Tensor, "classes dim"]:
        """Return the unit-norm embeddings of classes the prompt was not tuned on, by name."""
        tokens = self.tokenize(class_names)
        return self._backbone.text.encode(tokens, self.common_context, self.deeper_context)

    @property
    def common_context(self) -> Float[Tensor, "context width"]:
        """Return the context of classes that the prompt was not tuned on."""
        return self.context if self.context.dim() == 2 else self.context.mean(dim=0)

    @property
    def deeper_context(self) -> Float[Tensor, "blocks context width"] | None:
        """Return the vectors in the second block, the third, and so on; None without any."""
        return self.deeper

    def tokenize(self, class_names: Sequence[str]) -> Int[Tensor, "classes tokens"]:
        """Return token ids with places for the context in front of each name."""
        texts = [f"{name}." for name in class_names]
        return self._backbone.tokenize(texts, self.places)

    @property
    def places(self) -> int:
        """Return how many vectors stand in front of a name."""
        return self.context.shape[-2]


def prompt_settings(context: BuildContext) -> PromptSettings:
    """Return the settings of prompts, of depth 1 where the part `text-prompts` is off."""
    settings = context.config.prompt
    return settings if "text-prompts" in context.config.parts else replace(settings, depth=1)
