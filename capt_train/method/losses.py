"""The loss terms of METHOD 6: pure functions, unweighted, computed in float32 or wider."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_CLIP_SCALE = 100.0  # 1/τ of the models that TCPT was measured on


def wide(values: Tensor) -> Tensor:
    """Return values in float32 or wider: sums of exponentials and squares need it."""
    return values if values.dtype == torch.float64 else values.float()


def _label_probabilities(logits: Tensor, labels: Tensor) -> Float[Tensor, " batch"]:
    return wide(logits).softmax(dim=1).gather(1, labels[:, None]).squeeze(1)


def cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Return the mean of −log p(y)."""
    return functional.cross_entropy(wide(logits), labels)


def noisy_likelihood(
    logits: Float[Tensor, "batch columns"],
    labels: Int[Tensor, " batch"],
    share: float,
    classes: int | None = None,
) -> Float[Tensor, " batch"]:
    """Return (1−ε)·p(y) + ε·(1−p(y))/(C−1): the probability of labels, a share ε of them wrong.

    A wrong label is any other class, all equally often: the forward correction of Patrini et al.
    (arXiv 1609.03683) for symmetric noise.

    Args:
        logits: scaled.
        labels: y, columns of `logits`.
        share: ε.
        classes: C where columns stand for several classes; by default the number of columns.
    """
    probability = _label_probabilities(logits, labels)
    others = max(1, (classes or logits.shape[1]) - 1)
    return probability + share * ((1 - probability) / others - probability)


def right_probabilities(
    logits: Float[Tensor, "batch columns"],
    labels: Int[Tensor, " batch"],
    share: float,
    classes: int | None = None,
) -> Float[Tensor, " batch"]:
    """Return the probability that each label is right; arguments as for `noisy_likelihood`."""
    probability = _label_probabilities(logits, labels)
    return (1 - share) * probability / noisy_likelihood(logits, labels, share, classes)


def noisy_cross_entropy(
    logits: Float[Tensor, "batch columns"],
    labels: Int[Tensor, " batch"],
    share: float,
    classes: int | None = None,
) -> Float[Tensor, ""]:
    """Return the mean of −log `noisy_likelihood`; the cross-entropy where no label is wrong.

    Its gradient is nearly that of the cross-entropy times the probability that the label is right:
    a label that the model finds as improbable as any other class is not learned.
    """
    if not share:
        return cross_entropy(logits, labels)
    return -noisy_likelihood(logits, labels, share, classes).log().mean()


def confusion_aware(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Return the mean of 1 − p(y), the CoA loss of CoCoA-Mix (arXiv 2506.07484).

    Its gradient is largest where p(y) is near one half: at samples that are confused, not at
    hopeless ones.
    """
    return (1 - _label_probabilities(logits, labels)).mean()


def margin(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    scale: float,
) -> Float[Tensor, ""]:
    """Return −0.1·mean(m) + 0.01·var(m), the margin term of TCPT (arXiv 2602.19024).

    `m = z_y − max_{j≠y} z_j`; the variance is that of the population. Margins grow on average, yet
    evenly, so that confidence is not driven by a few samples. The two constants were chosen for
    CLIP, whose logits are 100·cosine. So m is measured in that unit on every model *(ours)*: on
    one of scale 20, margins in its own logits would have a 5th of the mean and a 25th of the
    variance.

    Args:
        logits: scaled by `scale`.
        labels: y.
        scale: 1/τ.
    """
    scores = wide(logits) * (_CLIP_SCALE / scale)
    rivals = scores.scatter(1, labels[:, None], float("-inf"))
    margins = scores.gather(1, labels[:, None]) - rivals.max(dim=1, keepdim=True).values
    margins = margins.squeeze(1)
    return -0.1 * margins.mean() + 0.01 * margins.var(correction=0)


def confusion_infonce(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    mined: Int[Tensor, "batch pairs"],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Return the symmetric InfoNCE of CAPT (arXiv 2603.02557), restricted to confused classes.

    `M_b = {y_b} ∪ mined_b`. From image to prompts: `−log softmax(z_b over M_b)[y_b]`. From prompt
    to images *(ours)*: the prompt of `y_b` has to find image b among the images of the minibatch
    whose class is mined for b; other images of `y_b` are left out, as neither right nor wrong.
    The result is the average of both directions.

    Args:
        logits: scaled.
        labels: y.
        mined: the classes confused with each image.
        weights: of the images; by default all alike.
    """
    reduction = "mean" if weights is None else "none"
    scores = wide(logits)
    rows = torch.arange(len(labels), device=labels.device)
    allowed = torch.zeros_like(scores, dtype=torch.bool).scatter(1, mined, True)
    allowed[rows, labels] = True
    to_text = functional.cross_entropy(
        scores.masked_fill(~allowed, float("-inf")), labels, reduction=reduction
    )
    by_prompt = scores[:, labels].T  # row b: how well each image of the minibatch fits prompt y_b
    rivals = allowed[:, labels] & (labels[:, None] != labels)
    rivals[rows, rows] = True
    to_images = functional.cross_entropy(
        by_prompt.masked_fill(~rivals, float("-inf")), rows, reduction=reduction
    )
    both = (to_text + to_images) / 2
    return both if weights is None else (weights * both).mean()


def consistency(
    embeddings: Float[Tensor, "batch dim"], frozen: Float[Tensor, "batch dim"]
) -> Float[Tensor, ""]:
    """Return the mean of 1 − cos(f, f⁰) over unit-norm image embeddings *(ours)*.

    It keeps the visual side near the frozen tower where a change does not lower the other terms.
    """
    return 1 - (wide(embeddings) * wide(frozen)).sum(dim=1).mean()


def balance(gates: Float[Tensor, "batch experts"]) -> Float[Tensor, ""]:
    """Return the squared coefficient of variation of the experts' importance (arXiv 1701.06538).

    An expert's importance is the sum of its gates over the batch. 0 where all are used alike; the
    gradient reaches the router.
    """
    importance = wide(gates).sum(dim=0)
    return importance.var(correction=0) / importance.mean().square()


def moments(
    embeddings: Float[Tensor, "classes dim"], reference: Float[Tensor, "classes dim"]
) -> Float[Tensor, ""]:
    """Return ‖μ−μ⁰‖² + ‖Σ−Σ⁰‖_F² over class embeddings, TCPT (arXiv 2602.19024).

    `Σ = XcᵀXc/C` is D×D; ‖Σ−Σ⁰‖² = ‖Σ‖² − 2⟨Σ,Σ⁰⟩ + ‖Σ⁰‖², and each of the three is a squared
    norm of a C×C product of centred embeddings, so D×D matrices are formed only where C ≥ D.
    Embeddings have unit norm, so the term does not depend on the model's logit scale.
    """
    with torch.autocast(embeddings.device.type, enabled=False):  # else in half precision
        return _moment_distance(wide(embeddings), wide(reference))


def _moment_distance(tuned: Tensor, anchor: Tensor) -> Tensor:
    centred = tuned - tuned.mean(dim=0)
    centred_anchor = anchor - anchor.mean(dim=0)
    shift = (tuned.mean(dim=0) - anchor.mean(dim=0)).square().sum()
    classes, dim = tuned.shape
    if classes < dim:
        spread = (
            (centred @ centred.T).square().sum()
            - 2 * (centred @ centred_anchor.T).square().sum()
            + (centred_anchor @ centred_anchor.T).square().sum()
        )
    else:
        spread = (centred.T @ centred - centred_anchor.T @ centred_anchor).square().sum()
    return shift + spread / classes**2
