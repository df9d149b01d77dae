"""The tuning loop. Everything that varies from step to step is a function of seed and step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from capt_deploy.console import progress
from capt_deploy.errors import RunError
from capt_train import losses
from capt_train.calibration import fit_temperature
from capt_train.checkpoint import TuningState, load_checkpoint, save_checkpoint
from capt_train.config import LossWeights, TrainConfig
from capt_train.features import Features
from capt_train.prompt import PromptLearner
from capt_train.schedule import learning_rate

BEST, LAST = "best.safetensors", "last.safetensors"


@dataclass(frozen=True)
class TuningTask:
    """What is tuned on, apart from the prompt itself."""

    scale: float  # 1/τ of the backbone
    tuned: tuple[int, ...]  # indices of the classes that are tuned, ascending
    train: Features  # images of these classes
    val: Features  # likewise; may be empty
    reference: Float[Tensor, "classes dim"]  # hand-written t⁰ of these classes
    config: TrainConfig


def tune(prompt: PromptLearner, task: TuningTask, folder: Path) -> TuningState:
    """Tune `prompt`; on return it holds the best epoch's parameters, which lie in `folder` too.

    Best is the lowest calibrated NLL on validation, or the last epoch where there is none or
    patience is 0. If `folder` holds the checkpoint of an interrupted run, tuning continues from
    it and ends with the very bits that it would have had uninterrupted (on the same machine,
    with the same number of threads).

    Raises:
        RunError: a loss term is not finite; the last good checkpoint stays.
    """
    config = task.config
    optimizer = _optimizer(prompt, config)
    state = TuningState()
    if (folder / LAST).exists():
        state = load_checkpoint(folder / LAST, prompt, optimizer)
    with progress("tuning", config.epochs, "epochs") as counter:
        counter.advance(state.epoch)
        while state.epoch < config.epochs and not _stale(state, task):
            try:
                terms = _train_epoch(prompt, task, optimizer, state.epoch)
                nll = _validation_nll(prompt, task)
            except FloatingPointError as cause:
                kept = f"; the state before that epoch is kept in {LAST}" if state.epoch else ""
                raise RunError(
                    f"{folder}: in epoch {state.epoch + 1} {cause}; lower learning_rate and tune "
                    f"again{kept}"
                ) from cause
            state = _next(state, terms, nll, config.patience)
            if state.best_epoch == state.epoch:
                save_checkpoint(folder / BEST, prompt, state)
            save_checkpoint(folder / LAST, prompt, state, optimizer)
            newest = reversed(list(state.history[-1].items()))  # validation first, if there is any
            counter.advance(1, ", ".join(f"{name} {value:.3f}" for name, value in newest))
    load_checkpoint(folder / BEST, prompt)
    return state


def _train_epoch(
    prompt: PromptLearner, task: TuningTask, optimizer: torch.optim.Optimizer, epoch: int
) -> dict[str, float]:
    """Take one step for every minibatch; return the mean of every loss term."""
    config, device = task.config, prompt.context.device
    features = task.train.embeddings.to(device)
    labels = task.train.labels_among(task.tuned).to(device)
    reference = task.reference.to(device)
    batches = -(-len(features) // config.batch_size)
    order = torch.randperm(len(features), generator=_generator(config.seed, epoch)).to(device)
    means: dict[str, float] = {}
    for batch in range(batches):
        rate = learning_rate(
            epoch * batches + batch,
            config.epochs * batches,
            min(config.warmup_epochs, config.epochs - 1) * batches,
            config.learning_rate,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = order[batch::batches]
        embeddings = prompt(task.tuned)  # once a step, for all samples of the minibatch
        logits = task.scale * features[rows] @ embeddings.T
        terms = loss_terms(logits, labels[rows], embeddings, reference, config.loss_weights)
        for name, value in terms.items():
            if not torch.isfinite(value):
                raise FloatingPointError(f"the {name} term became {value.item()}")
            means[name] = means.get(name, 0.0) + value.item() / batches
        optimizer.zero_grad()
        weighted_sum(terms, config.loss_weights).backward()
        optimizer.step()
    return means


_TERMS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda logits, labels, own, reference: losses.cross_entropy(logits, labels),
    "coa": lambda logits, labels, own, reference: losses.confusion_aware(logits, labels),
    "margin": lambda logits, labels, own, reference: losses.margin(logits, labels),
    "moments": lambda logits, labels, own, reference: losses.moments(own, reference),
}


def loss_terms(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    embeddings: Float[Tensor, "classes dim"],
    reference: Float[Tensor, "classes dim"],
    weights: LossWeights,
) -> dict[str, Tensor]:
    """Return the unweighted terms whose weight is not 0."""
    return {
        name: term(logits, labels, embeddings, reference)
        for name, term in _TERMS.items()
        if getattr(weights, name)
    }


def weighted_sum(terms: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Return the one number that is minimised."""
    return torch.stack([getattr(weights, name) * value for name, value in terms.items()]).sum()


def _optimizer(prompt: PromptLearner, config: TrainConfig) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(prompt.parameters(), rate, config.momentum, weight_decay=decay)
    return torch.optim.AdamW(prompt.parameters(), rate, weight_decay=decay)


def _generator(seed: int, epoch: int) -> torch.Generator:
    # Both in one number, far apart, so that neighbouring seeds do not share epochs.
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _stale(state: TuningState, task: TuningTask) -> bool:
    patience = task.config.patience
    return bool(len(task.val) and patience and state.epochs_since_best >= patience)


def _next(
    state: TuningState, terms: dict[str, float], nll: float | None, patience: int
) -> TuningState:
    epoch = state.epoch + 1
    history = (*state.history, terms if nll is None else {**terms, "val_nll": nll})
    if not patience or nll is None or state.best_nll is None or nll < state.best_nll:
        return TuningState(epoch, epoch, nll, history)
    return replace(state, epoch=epoch, history=history)


@torch.no_grad()
def _validation_nll(prompt: PromptLearner, task: TuningTask) -> float | None:
    """Return the NLL at the temperature that would be fitted now, for so the model will be used.

    At temperature 1 the NLL mostly tells how far the scale is off, which calibration mends (ours).
    """
    embeddings = prompt(task.tuned)
    if not torch.isfinite(embeddings).all():  # the epoch's last step went too far
        raise FloatingPointError("the class embeddings became nan")
    if not len(task.val):
        return None
    logits = task.scale * task.val.embeddings.to(embeddings.device) @ embeddings.T
    labels = task.val.labels_among(task.tuned).to(embeddings.device)
    return float(functional.cross_entropy(logits / fit_temperature(logits, labels), labels))
