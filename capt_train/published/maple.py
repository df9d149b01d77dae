"""MaPLe (arXiv 2210.03117): visual tokens that are linear maps of the text context."""

import weakref

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capt_deploy.core.errors import ConfigError
from capt_train.clip.vision_tower import Tower
from capt_train.method.base import BuildContext
from capt_train.method.prompt import PromptLearner
from capt_train.method.visual_prompts import PromptTokens


class CoupledPrompts(PromptTokens):
    """`P̃_i = F_i(P_i)`, eq. 6: a linear map for each block that has vectors in both towers."""

    folded: Tensor | None  # the tokens of each block, at inference

    def __init__(self, tower: Tower, prompt: PromptLearner, depth: int) -> None:
        """Create the maps.

        Args:
            tower: the frozen one.
            prompt: whose vectors are mapped.
            depth: blocks that have tokens of their own, at most.
        """
        count, width = prompt.context.shape
        of_text = 1 if prompt.deeper is None else 1 + len(prompt.deeper)
        super().__init__(tower, range(min(depth, tower.depth, of_text)), count)
        # trained by the text side; a reference is no module here, and is not copied with the part
        self._prompt = weakref.ref(prompt)
        self.maps = nn.ModuleList(nn.Linear(width, tower.width) for _ in self.blocks)
        self.register_buffer("folded", None)

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> "CoupledPrompts":
        """Return a map for each of the first `visual.prompt_depth` blocks."""
        prompts = [prompt for prompt in context.prompts if isinstance(prompt, PromptLearner)]
        if not prompts or context.config.prompt.class_specific:
            raise ConfigError("coupled-prompts: expected the part prompt beside it, of all classes")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.config.seed)
            return cls(tower, prompts[0], context.config.visual.prompt_depth)

    def block_vectors(self, place: int) -> Float[Tensor, "prompts width"]:
        """Return the tokens of a block, from the text's vectors of the same block."""
        if self.folded is not None:
            return self.folded[place]
        prompt = self._prompt()
        if prompt is None:
            raise ValueError("the prompt of these tokens is gone")
        of_text = prompt.context if prompt.deeper is None or not place else prompt.deeper[place - 1]
        tokens: Tensor = self.maps[place](of_text)
        return tokens

    def fold(self, alpha: Tensor, strength: Tensor) -> None:
        """Replace the maps by the tokens that they give."""
        tokens = [self.block_vectors(place).detach() for place in range(len(self.maps))]
        self.folded, self.maps = torch.stack(tokens), nn.ModuleList()
