"""The CoCoA mixture of the hand-written prompt and learned components (METHOD 7), fitted last.

Confidence-aware weights of CoCoA-Mix (arXiv 2506.07484): the weight of each learned component,
a prompt for example, is fitted once for the classes it was tuned on and once for all others.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capt_deploy.core.errors import ModelError, RunError
from capt_train.method.losses import cross_entropy, wide

_START = 0.5  # the first share of each learned component
_STEPS = 1000  # at most
_LEARNING_RATE = 0.5
_SLOPE_AT_REST = 1e-5
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Mixture:
    """π over K+1 components, the hand-written prompt first; each of the two sums to 1."""

    inside: tuple[float, ...]  # for classes that were tuned on
    outside: tuple[float, ...]  # for all others

    def __post_init__(self) -> None:
        if len(self.inside) != len(self.outside) or len(self.inside) < 2:
            raise RunError(
                f"mixture: expected as many weights inside as outside, at least 2, came "
                f"{len(self.inside)} and {len(self.outside)}"
            )
        for values in (self.inside, self.outside):
            # Written so that NaN fails too.
            if not (min(values) >= 0 and abs(sum(values) - 1) <= _ROUNDING):
                raise RunError(f"mixture: expected weights of 0 to 1 that sum to 1, came {values}")

    @classmethod
    def learned_only(cls, learned: int) -> "Mixture":
        """Return equal parts of the learned components and nothing of the hand-written prompt."""
        weights = (0.0, *[1 / learned] * learned)
        return cls(weights, weights)

    @classmethod
    def from_dict(cls, content: Any, learned: int) -> "Mixture":
        """Read the JSON form of a mixture with K = `learned`.

        Raises:
            RunError: other keys, other than K+1 numbers, a weight below 0 or not finite, or a sum
                that is not 1.
        """
        if not isinstance(content, dict) or set(content) != {"inside", "outside"}:
            raise RunError(f"mixture: expected lists 'inside' and 'outside', came {content!r}")
        for values in content.values():
            if (
                not isinstance(values, list)
                or len(values) != learned + 1
                or not all(type(value) in (int, float) for value in values)
            ):
                raise RunError(f"mixture: expected {learned + 1} numbers, came {values!r}")
        return cls(**{name: tuple(map(float, values)) for name, values in content.items()})

    def to_dict(self) -> dict[str, list[float]]:
        """Return the JSON form."""
        return {name: list(values) for name, values in asdict(self).items()}

    def rows(
        self, embeddings: Float[Tensor, "components classes dim"], tuned: Sequence[bool]
    ) -> Float[Tensor, "classes dim"]:
        """Return Ŵ_c = Σ_i π_i(c)·t_{i,c}, in float32 or wider.

        Never renormalised (METHOD 9): a row's norm carries the weight of its class.

        Args:
            embeddings: t_{i,c}, unit norm, the hand-written prompt first.
            tuned: whether each class was tuned on.

        Raises:
            ValueError: weights, classes and embeddings differ in number.
        """
        if embeddings.shape[:2] != (len(self.inside), len(tuned)):
            raise ValueError(
                f"{len(self.inside)} components and {len(tuned)} classes expected, "
                f"came embeddings of shape {tuple(embeddings.shape)}"
            )
        rows = wide(embeddings)
        weights = rows.new_tensor([self.inside if known else self.outside for known in tuned])
        return (weights.T[:, :, None] * rows).sum(dim=0)


def weights(shares: Float[Tensor, " learned"]) -> Float[Tensor, " learned+1"]:
    """Return π of the shares s_i = σ(a_i): π_i = s_i/K, and π₀ = 1 − Σ_i π_i.

    Ours: with K = 1 it is the paper's sigmoid weight, and for every K each π is positive and their
    sum is 1 without a constraint.
    """
    return torch.cat([(1 - shares).mean(dim=0, keepdim=True), shares / len(shares)])


def inside_loss(
    shares: Float[Tensor, " learned"],
    logits: Float[Tensor, "batch components classes"],
    labels: Int[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Return the mean of −log p(y) of the mixed logits z = Σ_i π_i z_i, in float32 or wider.

    Args:
        shares: σ(a_i) of the learned components.
        logits: z_i of every component, the hand-written prompt first.
        labels: y.
    """
    return cross_entropy((weights(shares)[:, None] * wide(logits)).sum(dim=1), labels)


def outside_loss(
    shares: Float[Tensor, " learned"],
    logits: Float[Tensor, "batch components pseudo"],
    d: float = 0.1,
) -> Float[Tensor, ""]:
    """Return Σ_i mean max(0, H(p_t0) − H(p_ti) + d), in float32 or wider.

    On classes that it was not tuned on, a learned component should be less sure than the
    hand-written prompt, by `d`. Both are scaled by their weights in the mixture of the two alone:
    p_ti = softmax(s_i·z_i) and p_t0 = softmax((1−s_i)·z_0). (Ours: the paper leaves open how the
    weights enter H.) So a component that equals the hand-written prompt has no loss at s_i = 0.5
    and d = 0; a larger d lowers its share until the two entropies differ by d. Each term depends
    on one share alone and never falls as that share grows.

    Args:
        shares: s_i = σ(a_i) of the learned components, before they are divided by K.
        logits: z_i over the pseudo-classes of every component, the hand-written prompt first.
        d: nats.
    """
    scores = wide(logits)
    hand_written = _entropy((1 - shares)[:, None] * scores[:, :1])
    learned = _entropy(shares[:, None] * scores[:, 1:])
    return (hand_written - learned + d).clamp(min=0).mean(dim=0).sum()


def fit_inside(
    logits: Float[Tensor, "batch components classes"], labels: Int[Tensor, " batch"]
) -> tuple[float, ...]:
    """Return π_in, one weight vector for all classes tuned on; minimises `inside_loss`.

    Args:
        logits: z_i of the training samples over these classes, the hand-written prompt first.
        labels: their classes, as positions among these.
    """
    return _descend(lambda shares: inside_loss(shares, logits, labels), logits)


def fit_outside(
    logits: Float[Tensor, "batch components pseudo"], d: float = 0.1
) -> tuple[float, ...]:
    """Return π_out, one weight vector for all classes not tuned on; minimises `outside_loss`.

    The fit only lowers shares, from 0.5 down to where the loss becomes 0.

    Args:
        logits: z_i of the training samples over the pseudo-classes, the hand-written prompt first.
        d: nats by which a learned component should be less sure.
    """
    return _descend(lambda shares: outside_loss(shares, logits, d), logits)


@torch.no_grad()
def component_logits(
    features: Float[Tensor, "batch dim"],
    embeddings: Float[Tensor, "components classes dim"],
    scale: float,
) -> Float[Tensor, "batch components classes"]:
    """Return z_i = scale·f·t_i of every component, in float32 or wider also under autocast."""
    with torch.autocast(features.device.type, enabled=False):
        return scale * torch.einsum("bd,pcd->bpc", wide(features), wide(embeddings))


def pseudo_class_names(
    words: Sequence[str], count: int, seed: int, exclude: Sequence[str]
) -> list[str]:
    """Return `count` different random words that stand for classes never tuned on.

    Args:
        words: a vocabulary, such as `whole_words` returns.
        count: number of words to draw.
        seed: of the draw.
        exclude: class names; no word that is one, or a part of one, is drawn.

    Raises:
        ModelError: the vocabulary holds too few such words.
    """
    names = "\n".join(exclude).lower()
    usable = [word for word in words if word not in names]
    if len(usable) < count:
        raise ModelError(
            f"pseudo-classes: expected {count} words, but the tokenizer's vocabulary has only "
            f"{len(usable)} that are in no class name; tune with --without mixture"
        )
    return random.Random(seed).sample(usable, count)


def _entropy(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def _descend(
    loss: Callable[[Tensor], Tensor], logits: Float[Tensor, "batch components classes"]
) -> tuple[float, ...]:
    """Minimise a loss of the shares σ(a) by gradient descent on a; return π.

    There is no momentum, which would carry a share past the point where the hinge of
    `outside_loss` reaches 0.
    """
    raw = wide(logits).new_full((logits.shape[1] - 1,), math.log(_START / (1 - _START)))
    with torch.enable_grad():
        for _ in range(_STEPS):
            raw.requires_grad_()
            (slope,) = torch.autograd.grad(loss(raw.sigmoid()), raw)
            raw = (raw - _LEARNING_RATE * slope).detach()
            if slope.abs().max() < _SLOPE_AT_REST:
                break
    return tuple(weights(raw.double().sigmoid()).tolist())
