"""The training loop. Everything random in a step depends on seed, stage and epoch alone."""

import math
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capt_deploy.core.errors import RunError
from capt_train import parallel
from capt_train.calibrate.temperature import calibrated_nll
from capt_train.config import TrainConfig
from capt_train.confusion.bank import mined_classes, retrieve
from capt_train.method.class_rows import ClassRows
from capt_train.method.learner import Learner
from capt_train.method.loss_terms import Step, loss_terms, weighted_sum
from capt_train.parts import PARTS, load
from capt_train.tune.checkpoint import TuningState, load_checkpoint, part_of, save_checkpoint
from capt_train.tune.precision import Precision
from capt_train.tune.stages import Stage, TuningTask, text_stage


def train_epochs(learner: Learner, task: TuningTask) -> None:
    """Train the text side for all its epochs, in place, without checkpoints.

    Raises:
        FloatingPointError: a loss term or its gradient is not finite.
    """
    if stage := text_stage(task, learner):
        loop = Epochs(learner, task, stage)
        for number in range(stage.epochs):
            loop.epoch(number)
        loop.finish()


class Epochs:
    """The learner with its optimizer and confusion bank, trained epoch by epoch."""

    def __init__(self, learner: Learner, task: TuningTask, stage: Stage) -> None:
        config = task.config
        self._learner, self._task, self._stage = learner, task, stage
        self._device = task.reference.device
        self._parameters = [
            *(learner.text_parameters if stage.text else ()),
            *(learner.visual_parameters if stage.visual else ()),
        ]
        parts = [PARTS[name] for name in sorted(config.parts)]
        guides = [load(part.guide) for part in parts if part.guide]
        weights = [load(part.average) for part in parts if part.average]
        self._guide = guides[0] if guides and stage.text else None
        self._weight = weights[0] if weights and stage.text else None
        self._sums = [torch.zeros_like(p) for p in self._parameters] if self._weight else []
        self._total = 0.0  # of the weights of the epochs so far
        self._optimizer = _optimizer(self._parameters, config)
        self._precision = Precision(config.tuning.autocast, self._device)
        self._labels = task.labels.to(self._device)
        self._label_noise = task.label_noise
        self.bank = task.bank

    def epoch(self, number: int) -> dict[str, float]:
        """Take one step per minibatch and return the mean of each loss term.

        Raises:
            FloatingPointError: a term or its gradient is not finite.
        """
        config, samples = self._task.config, len(self._labels)
        draw = _generator(config.seed, self._stage, number)
        order = torch.randperm(samples, generator=draw)
        batches = -(-samples // self._stage.batch_size)
        mined, partners = self._mine()
        weights = {**config.loss_weights, "consistency": self._stage.consistency}
        means: dict[str, float] = {}
        for batch in range(batches):
            self._set_rate(number * batches + batch, batches)
            rows = order[batch::batches]
            size = len(rows)
            if partners is not None:
                rows = torch.cat([rows, _one_each(partners[rows], draw).to(rows)])
            views = torch.zeros_like(rows)
            if self._stage.visual and self._task.views is not None:
                views = torch.randint(self._task.views.trained, rows.shape, generator=draw)
            chosen = None if mined is None else mined[rows]
            step = self._step(rows, size, views, chosen)
            terms = loss_terms(step, weights)
            guides = None
            if self._guide is not None:
                guides = self._gradient(self._precision.scaled(self._guide(step)))
            for name, value in terms.items():
                if not torch.isfinite(value):
                    raise FloatingPointError(f"the {name} term became {value.item()}")
                means[name] = means.get(name, 0.0) + value.item() / batches
            loss = weighted_sum(terms, weights)
            clip_norm = config.tuning.clip_norm
            if not self._precision.step(loss, self._optimizer, self._parameters, clip_norm, guides):
                # backward freed the graph of the terms
                again = loss_terms(self._step(rows, size, views, chosen), weights)
                raise FloatingPointError(f"the gradient of {self._culprit(again)} became nan")
        if self._weight is not None:
            weight = self._weight(number + 1, self._stage.epochs, config)
            self._total += weight
            for place, parameter in enumerate(self._parameters):
                self._sums[place] += weight * parameter.detach()
        return means

    @torch.no_grad()
    def finish(self) -> bool:
        """Replace the parameters by their mean over the epochs where a part asks for it."""
        if not self._total:
            return False
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            parameter.copy_(total / self._total)
        return True

    def _gradient(self, loss: Tensor) -> list[Tensor]:
        gradients = torch.autograd.grad(
            loss, self._parameters, retain_graph=True, allow_unused=True
        )
        return parallel.averaged(
            [
                torch.zeros_like(parameter) if gradient is None else gradient
                for parameter, gradient in zip(self._parameters, gradients, strict=True)
            ]
        )

    def _step(self, rows: Tensor, size: int, views: Tensor, mined: Tensor | None) -> Step:
        """Run the trained sides for some images, each in one of its views.

        Args:
            rows: the minibatch, followed by the samples that were retrieved for it.
            size: of the minibatch.
            views: of all rows.
            mined: classes confused with all rows.
        """
        task, device = self._task, self._device
        images = frozen = self._images(rows, views)
        gates: tuple[Tensor, ...] = ()
        embeddings = None
        with self._precision.towers():
            if self._stage.visual:
                part = parallel.split_rows(rows)
                tokens = self._tokens(part, parallel.split_rows(views))
                alpha = None if task.alpha is None else task.alpha[part].to(device)
                encoded = self._learner.images(tokens, alpha, shortcut=True)
                outputs = (encoded.embeddings, *encoded.gates)
                images, *routed = (parallel.gather_rows(output, len(rows)) for output in outputs)
                gates = tuple(gate[:size] for gate in routed)
            if self._stage.text:
                logits, texts = self._learner.answer(images, task.tuned)
                embeddings = texts.embeddings.float()
                gates += texts.gates
            else:
                logits = self._class_rows().logits(images, task.scale)[None]
        return Step(
            logits,
            self._labels[rows],
            task.scale,
            embeddings,
            task.reference,
            mined,
            images=images,
            frozen=frozen,
            gates=gates,
            label_noise=self._label_noise,
            targets=None if task.targets is None else task.targets[rows].to(device),
        ).with_retrieved(size)

    def _images(self, rows: Tensor, views: Tensor) -> Float[Tensor, "batch dim"]:
        """Return embeddings of the views of some images by the frozen tower."""
        task = self._task
        if self._stage.visual and task.views is not None:
            return task.views.embeddings[views, rows].to(self._device)
        return task.train.embeddings[rows].to(self._device)

    def _tokens(self, rows: Tensor, views: Tensor) -> Float[Tensor, "batch tokens width"]:
        task = self._task
        if task.views is None or task.views.tokens is None:
            raise ValueError("the visual side is trained on tokens, and the task has none")
        return task.views.tokens[views, rows].to(self._device).float()

    def _class_rows(self) -> ClassRows:
        """Return the class rows in force: those of the task where only the visual side is tuned."""
        fixed = None if self._stage.text else self._task.class_rows
        return self._learner.class_rows(self._task.tuned) if fixed is None else fixed

    def _mine(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the mined classes of each image, and the confused samples retrieved for it."""
        if self.bank is None:
            return None, None
        mined = mined_classes(self.bank, self._task.config.confusion.pairs)
        config = self._task.config
        if "retrieval" not in config.parts or not config.loss_weights["infonce"]:
            return mined, None
        return mined, retrieve(self.bank, torch.arange(len(mined), device=mined.device), mined)

    @torch.no_grad()
    def update_bank(self) -> None:
        """Update the bank with predictions on the views that are never trained on (METHOD 2)."""
        views = self._task.views
        if self.bank is None or views is None or not views.held:
            return
        images = views.held_embeddings(self._learner if self._stage.visual else None)
        logits = self._class_rows().logits(images.to(self._device), self._task.scale)
        self.bank = self.bank.updated(logits, self._task.config.confusion.momentum)

    @torch.no_grad()
    def validation_nll(self) -> float | None:
        """Return the validation NLL in nats at the best temperature; None without images (ours).

        At temperature 1 the NLL mostly measures a wrong scale, which calibration corrects later.

        Raises:
            FloatingPointError: embeddings are not finite after the epoch's last step.
        """
        task = self._task
        class_rows = self._class_rows()
        images = task.val.embeddings.to(self._device)
        if self._stage.visual and len(task.val) and task.val_tokens is not None:
            images = self._learner.embed_tokens(task.val_tokens)
        elif self._stage.visual and task.views is not None and task.views.tokens is not None:
            # one image is enough to see nan
            images = self._learner.embed_tokens(task.views.tokens[0, :1])
        for name, embeddings in (("class", class_rows.rows), ("image", images)):
            if not torch.isfinite(embeddings).all():
                raise FloatingPointError(f"the {name} embeddings became nan")
        if not len(task.val):
            return None
        if self._stage.text and self._learner.reads_images:
            logits = self._learner.logits(images, task.tuned)
        else:
            logits = class_rows.logits(images, task.scale)
        labels = task.val.labels_among(task.tuned).to(self._device)
        return parallel.agreed(calibrated_nll(logits, labels))

    def save(self, path: Path, state: TuningState) -> None:
        """Write a checkpoint with everything that the next epoch depends on."""
        extra = {f"precision.{name}": value for name, value in self._precision.state().items()}
        if self.bank is not None:
            extra |= {f"bank.{name}": tensor for name, tensor in vars(self.bank).items()}
        if self._weight is not None:
            extra |= {f"sums.{place}": values for place, values in enumerate(self._sums)}
            extra["sums.total"] = torch.tensor(self._total, dtype=torch.double)
        save_checkpoint(path, self._learner, state, self._optimizer, extra)

    def load(self, path: Path) -> TuningState:
        """Load a checkpoint written by `save` and return its state.

        Raises:
            RunError: it is of another run, or of a version whose bank has another form.
        """
        state, extra = load_checkpoint(path, self._learner, self._optimizer)
        self._precision.load(part_of(extra, "precision"))
        if self.bank is not None:
            bank = part_of(extra, "bank")
            if bank.keys() != vars(self.bank).keys():
                raise RunError(f"{path}: of another version of capt; tune again into a new folder")
            self.bank = replace(self.bank, **bank).to(self._device)
        if self._weight is not None:
            sums = part_of(extra, "sums")
            self._total = float(sums.pop("total"))
            self._sums = [sums[str(place)].to(self._device) for place in range(len(sums))]
        return state

    def _set_rate(self, step: int, batches: int) -> None:
        tuning, stage = self._task.config.tuning, self._stage
        warmup = min(tuning.warmup_epochs, stage.epochs - 1) * batches
        total = stage.epochs * batches
        rate = learning_rate(step, total, warmup, stage.rate, tuning.warmup_rate)
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def _culprit(self, terms: dict[str, Tensor]) -> str:
        """Return the name of the first term whose gradient is not finite."""
        for name, value in terms.items():
            if not value.requires_grad:  # a term of modules that this stage does not train
                continue
            gradients = torch.autograd.grad(
                value, self._parameters, retain_graph=True, allow_unused=True
            )
            if not all(torch.isfinite(g).all() for g in gradients if g is not None):
                return f"the {name} term"
        return "the weighted sum"


def _one_each(partners: Int[Tensor, "batch mined"], draw: torch.Generator) -> Int[Tensor, " some"]:
    """Return one random retrieved sample for each query that has any (-1 marks none)."""
    retrieved = partners >= 0
    order = torch.rand(partners.shape, generator=draw).to(partners.device)
    chosen = partners.gather(1, order.masked_fill(~retrieved, -1.0).argmax(dim=1, keepdim=True))
    return chosen[retrieved.any(dim=1)].squeeze(1)


def _optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    tuning = config.tuning
    rate, decay = tuning.learning_rate, tuning.weight_decay
    if tuning.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, tuning.momentum, weight_decay=decay)
    return torch.optim.AdamW(parameters, rate, weight_decay=decay)


def _generator(seed: int, stage: Stage, epoch: int) -> torch.Generator:
    # far apart, so that neighbouring seeds do not share the random numbers of an epoch
    offset = zlib.crc32(stage.name.encode())
    return torch.Generator().manual_seed(seed * 1_000_003 + offset + epoch)


def learning_rate(
    step: int, total: int, warmup: int, peak: float, warmup_rate: float | None = None
) -> float:
    """Return the rate of a 0-based step: a warm-up, then a half cosine from `peak` to 0.

    The warm-up has `warmup_rate`, or rises linearly to `peak`. A pure function of the step, so
    that a resumed run needs no state for it.
    """
    if step < warmup:
        return peak * (step + 1) / warmup if warmup_rate is None else warmup_rate
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
