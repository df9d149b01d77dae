"""Independent vision-language prompting: deep prompts in both towers (arXiv 2210.03117)."""

from capt_train.clip.vision_tower import Tower
from capt_train.method.base import BuildContext
from capt_train.method.visual_prompts import VisualPrompts


class FirstPrompts(VisualPrompts):
    """Free tokens, new in each of the first `visual.prompt_depth` blocks, tuned with the text's."""

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> "FirstPrompts":
        """Return `visual.prompt_tokens` prompts in each of these blocks."""
        visual = context.config.visual
        blocks = range(tower.depth)[: visual.prompt_depth]
        return cls(tower, blocks, visual.prompt_tokens, context.generator)
