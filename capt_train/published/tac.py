"""TAC (Hao et al., CVPR 2025): a context behind vectors made of clusters of the classes."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capt_train.config import TrainConfig
from capt_train.method.base import BuildContext, ClassPrompt
from capt_train.method.prompt import PromptLearner, prompt_settings
from capt_train.method.semantic_experts import cluster

_CLUSTERS = 5


class ClusterPrompt(PromptLearner):
    """A linear map of cluster centres of the class embeddings stands before the learned context.

    The centres are those of K-means with cosine over the tuned classes. In each block the vectors
    in front are the same, and the learned ones behind them new. Two things differ from the authors'
    code: class embeddings are means over CLIP's templates, where theirs are means over descriptions
    by a language model; and the visual tower has plain prompts, without vectors of the clusters
    and their masked attention.
    """

    centres: Tensor

    def __init__(self, context: BuildContext) -> None:
        settings = prompt_settings(context)
        super().__init__(
            context.backbone, context.class_names, context.tuned, settings, context.generator
        )
        tuned = context.zero_shot[list(context.tuned)]
        centres = cluster(tuned, _CLUSTERS, context.config.seed)
        self.register_buffer("centres", centres.to(tuned))
        dim, width = tuned.shape[1], self.context.shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.config.seed)
            self.front = nn.Linear(dim, width)

    @classmethod
    def build(cls, context: BuildContext) -> Sequence[ClassPrompt]:
        """Return the prompt before the first step."""
        return [cls(context)]

    @property
    def places(self) -> int:
        """Return how many vectors stand in front of a name."""
        return _CLUSTERS + self.context.shape[-2]

    @property
    def common_context(self) -> Float[Tensor, "context width"]:
        """Return the vectors of the clusters and the learned ones."""
        return torch.cat([self.front(self.centres), super().common_context])

    @property
    def deeper_context(self) -> Float[Tensor, "blocks context width"] | None:
        """Return the same vectors of the clusters and the learned ones of each deeper block."""
        if self.deeper is None:
            return None
        front = self.front(self.centres).expand(len(self.deeper), -1, -1)
        return torch.cat([front, self.deeper], dim=1)


def equal(epoch: int, epochs: int, config: TrainConfig) -> float:
    """Return the weight of an epoch in the mean of the parameters: the same for all."""
    return 1.0
