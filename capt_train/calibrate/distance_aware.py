"""Compute the factors of distance-aware calibration of a tuned model."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capt_deploy.confidence.distance_aware import TunedTexts


def tuned_texts(
    rows: Float[Tensor, "classes dim"],
    hand_written: Float[Tensor, "classes dim"],
    tuned: Bool[Tensor, " classes"],
) -> TunedTexts:
    """Return the classes tuned on among some."""
    return TunedTexts(*(texts.detach().cpu()[tuned].numpy() for texts in (rows, hand_written)))


def distance_aware_factors(
    rows: Float[Tensor, "classes dim"],
    hand_written: Float[Tensor, "classes dim"],
    tuned: Bool[Tensor, " classes"],
    among: TunedTexts | None = None,
) -> Float[Tensor, " classes"]:
    """Return γ_c of every class, 1 of the tuned ones (arXiv 2402.04655, its section on DAC).

    Args:
        rows: Ŵ_c, of any norm.
        hand_written: t⁰_c.
        tuned: whether each class was tuned on; on the CPU.
        among: all classes tuned on, where they are not just those of these.
    """
    texts = among or tuned_texts(rows, hand_written, tuned)
    new = (own.detach().cpu()[~tuned].numpy() for own in (rows, hand_written))
    factors = torch.ones(len(rows))
    factors[~tuned] = torch.from_numpy(texts.factors(*new))
    return factors
