"""Semantic half of MGDE: what confused classes share and what tells them apart, as experts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from capt_train.method.base import BuildContext, ClassTransform
from capt_train.parts import SENTENCE_KINDS

_ROUTED_TO = 2  # experts for each class


class SemanticExperts(ClassTransform):
    """`t̃_c = norm(t_c + β Σ_e r_e(c) E_e(t_c))`, CAPT (arXiv 2603.02557), METHOD 5.

    `E_e(t_c) = softmax(t_c·M_{e,c}ᵀ/τ_e)·M_{e,c}·(I + U_e)`: each class attends to the sentences of
    its own mined pairs alone *(ours)*. Classes without sentences, as all that were not tuned on,
    keep their embeddings: sentences about others say nothing of them. β starts at 0, so the model
    starts as it was, and U_e has a low rank, because two free D×D matrices over-fit *(ours)*.

    The experts are the kinds of sentences and a last one that adds nothing, so that the router's
    top-2 leaves one out. It reads the class alone: a router that reads the image as well would
    cost a second C×D matrix and a norm for each image, and would not fold (METHOD 9).
    """

    centres: Tensor  # M_{e,c}

    def __init__(
        self,
        centres: Float[Tensor, "kinds tuned centres dim"],
        tuned: Sequence[int],
        temperature: float,
        rank: int,
        generator: torch.Generator,
    ) -> None:
        """Create the experts.

        Args:
            centres: unit norm, of the sentences of each class; see `cluster`. Zeros for a class
                without any.
            tuned: the indices of these classes.
            temperature: τ_e.
            rank: of U_e.
            generator: for the random starts of router and updates.
        """
        super().__init__()
        kinds, _, _, dim = centres.shape
        self._temperature = temperature
        self._places = {index: place for place, index in enumerate(tuned)}
        self.register_buffer("centres", centres.clone())
        self.down = nn.Parameter(torch.randn(kinds, dim, rank, generator=generator) / dim**0.5)
        self.up = nn.Parameter(torch.zeros(kinds, rank, dim))
        self.router = nn.Linear(dim, kinds + 1)
        # not zeros, with which all classes would be routed alike
        self.router.weight.data = 0.02 * torch.randn(kinds + 1, dim, generator=generator)
        nn.init.zeros_(self.router.bias)
        self.beta = nn.Parameter(torch.tensor(0.0))

    @classmethod
    def build(cls, context: BuildContext) -> "SemanticExperts":
        """Return experts on the centres, or on zeros, which a checkpoint replaces, without any."""
        settings, zero_shot, centres = context.config.experts, context.zero_shot, context.centres
        classes, dim = zero_shot.shape
        if centres is None:
            centres = zero_shot.new_zeros(len(SENTENCE_KINDS), classes, settings.centres, dim)
        chosen = centres[:, list(context.tuned)].to(zero_shot)
        return cls(chosen, context.tuned, settings.temperature, settings.rank, context.generator)

    def forward(
        self, embeddings: Float[Tensor, "classes dim"], classes: Sequence[int] | None
    ) -> tuple[Float[Tensor, "classes dim"], Float[Tensor, "classes experts"] | None]:
        """Return t̃, unit norm like the embeddings, and the gates; see `ClassTransform`."""
        if classes is None:
            return embeddings, None
        nothing = functional.pad(self.centres, (0, 0, 0, 0, 0, 1))  # the last class has no sentence
        centres = nothing[:, [self._places.get(index, -1) for index in classes]]
        scores = self.router(embeddings)
        best, chosen = scores.topk(_ROUTED_TO, dim=-1)
        gates = torch.zeros_like(scores).scatter(1, chosen, best.softmax(dim=-1))
        similarity = torch.einsum("cd,ecqd->ecq", embeddings, centres) / self._temperature
        prototypes = torch.einsum("ecq,ecqd->ecd", similarity.softmax(dim=-1), centres)
        answers = prototypes + prototypes @ self.down @ self.up
        moved = embeddings + self.beta * torch.einsum("ce,ecd->cd", gates[:, :-1], answers)
        # The old norm over the new one is exactly 1 as long as β is 0.
        old, new = embeddings.norm(dim=-1, keepdim=True), moved.norm(dim=-1, keepdim=True)
        return moved * (old / new), gates


def cluster(
    embeddings: Float[Tensor, "sentences dim"], centres: int, seed: int
) -> Float[Tensor, "centres dim"]:
    """Compress sentences to unit-norm K-means centres, by cosine.

    Where there are fewer distinct sentences than centres, centres repeat.
    """
    from sklearn.cluster import KMeans

    normalised = functional.normalize(embeddings.float().cpu(), dim=-1)
    distinct: Tensor = torch.unique(normalised, dim=0)
    count = min(centres, len(distinct))
    if count == len(distinct):
        return distinct[torch.arange(centres) % count]
    # On the unit sphere, Euclidean K-means orders by cosine.
    fitted = KMeans(count, n_init=4, random_state=seed).fit(distinct.double().numpy())
    return functional.normalize(torch.from_numpy(fitted.cluster_centers_).float(), dim=-1)
