"""2SFS (arXiv 2503.11609): LayerNorms of both towers first, then a linear classifier.

Of 300 steps for each photo of a class, 60 % tune the LayerNorms, the rest the classifier. New
classes are embedded by the tuned text tower.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from capt_train.clip.backbone import Backbone
from capt_train.clip.vision_tower import Tower
from capt_train.method.base import BuildContext
from capt_train.method.class_rows import RowPart, RowTask
from capt_train.method.weight_updates import LayerNorms, TextUpdates
from capt_train.published.minibatches import Schedule, minimise

_STEPS_A_SHOT = 120  # of the classifier: 40 % of 300


class TextNorms(TextUpdates):
    """Updates of gains and biases of all LayerNorms of the text tower; they start at 0."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__(context)
        text = context.backbone.text
        self._names = text.norm_weights()
        shapes = [text.weight(name).shape for name in self._names]
        self.updates = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)

    @classmethod
    def obstacle(cls, backbone: Backbone) -> str | None:
        """Return why this model cannot have the part; None where it can."""
        return None if backbone.text.norm_weights() else "the text tower has no LayerNorm"

    def weight_updates(self) -> Mapping[str, Tensor]:
        """Return the trained numbers."""
        return dict(zip(self._names, self.updates, strict=True))


class VisualNorms(LayerNorms):
    """Updates of the LayerNorms of all blocks of the visual tower.

    Those before the first block and behind the last stay as they are, unlike the authors'.
    """

    _scale = 1.0

    @classmethod
    def build(cls, tower: Tower, context: BuildContext) -> "VisualNorms":
        """Return updates in all blocks."""
        return cls(tower, range(tower.depth))


class LinearClassifier(RowPart):
    """Rows `w_c` of `z_c = scale·f·w_c`, trained from the class embeddings."""

    steps = _STEPS_A_SHOT * 16

    @classmethod
    def build(cls, context: BuildContext) -> "LinearClassifier":
        """Return rows for as many steps as the settings' shots ask for."""
        rows = cls(context.tuned, context.zero_shot.shape[1])
        rows.steps = _STEPS_A_SHOT * (context.config.shots or 16)
        return rows

    def fit(self, task: RowTask) -> None:
        """Train the rows by AdamW at 2e-4 on batches of 32."""
        rows = nn.Parameter(task.texts.clone())
        optimizer = torch.optim.AdamW([rows], 2e-4, weight_decay=0.01)

        def logits(images: Tensor) -> tuple[Tensor, Tensor]:
            return task.scale * images @ rows.T, functional.normalize(rows, dim=-1)

        minimise(optimizer, logits, task, Schedule(32, self.steps))
        self.weight.copy_(rows.detach())
