"""Semantic half of MGDE: what confused classes share and what tells them apart, as two experts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from capt_train.method.base import BuildContext, ClassTransform
from capt_train.parts import SENTENCE_KINDS


class SemanticExperts(ClassTransform):
    """`t̃_c = norm(t_c + β Σ_e r_e(c) E_e(t_c))`, CAPT (arXiv 2603.02557), METHOD 5.

    `E_e(t) = softmax(t·M_eᵀ/τ_e)·M_e·W_e`; β starts at 0, so the model starts as it was. The
    router's top-2 of two experts are both of them.
    """

    centres: Tensor  # M_e

    def __init__(self, centres: Float[Tensor, "experts centres dim"], temperature: float) -> None:
        """Create the experts.

        Args:
            centres: unit norm, of the sentences of each kind; see `cluster`.
            temperature: τ_e.
        """
        super().__init__()
        experts, _, dim = centres.shape
        self._temperature = temperature
        self.register_buffer("centres", centres.clone())
        # W_e = I + U_e, so that weight decay pulls towards the start.
        self.update = nn.Parameter(torch.zeros(experts, dim, dim))
        self.router = nn.Linear(dim, experts)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)
        self.beta = nn.Parameter(torch.tensor(0.0))

    @classmethod
    def build(cls, context: BuildContext) -> "SemanticExperts":
        """Return experts on the centres, or on zeros, which a checkpoint replaces, without any."""
        settings, zero_shot, centres = context.config.experts, context.zero_shot, context.centres
        shape = (len(SENTENCE_KINDS), settings.centres, zero_shot.shape[1])
        if centres is None:
            centres = zero_shot.new_zeros(shape)
        return cls(centres.to(zero_shot), settings.temperature)

    def forward(
        self, embeddings: Float[Tensor, "classes dim"]
    ) -> tuple[Float[Tensor, "classes dim"], Float[Tensor, "classes experts"]]:
        """Return t̃, unit norm like the embeddings, and the gates."""
        gates = self.router(embeddings).softmax(dim=-1)
        similarity = torch.einsum("cd,eqd->ecq", embeddings, self.centres) / self._temperature
        prototypes = torch.einsum("ecq,eqd->ecd", similarity.softmax(dim=-1), self.centres)
        answers = prototypes + torch.einsum("ecd,edf->ecf", prototypes, self.update)
        moved = embeddings + self.beta * torch.einsum("ce,ecd->cd", gates, answers)
        # The old norm over the new one is exactly 1 as long as β is 0.
        old, new = embeddings.norm(dim=-1, keepdim=True), moved.norm(dim=-1, keepdim=True)
        return moved * (old / new), gates


def cluster(
    embeddings: Sequence[Float[Tensor, "_ dim"]], centres: int, seed: int
) -> Float[Tensor, "kinds centres dim"]:
    """Compress the sentences of each kind to unit-norm K-means centres, by cosine.

    Where there are fewer distinct sentences than centres, centres repeat.
    """
    from sklearn.cluster import KMeans

    clustered = []
    for rows in embeddings:
        distinct = torch.unique(functional.normalize(rows.float().cpu(), dim=-1), dim=0)
        count = min(centres, len(distinct))
        # On the unit sphere, Euclidean K-means orders by cosine.
        fitted = KMeans(count, n_init=4, random_state=seed).fit(distinct.double().numpy())
        middle = functional.normalize(torch.from_numpy(fitted.cluster_centers_).float(), dim=-1)
        clustered.append(middle[torch.arange(centres) % count])
    return torch.stack(clustered)
