"""Judge candidates on the photos that each fold holds out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from capt_train.calibrate.temperature import calibrated_losses, fit_temperature
from capt_train.method.class_map import mapped
from capt_train.method.class_rows import UNCHANGED, ClassRows, Discriminant, Outside, discriminant
from capt_train.parallel import agreed
from capt_train.tune.candidates import Candidate
from capt_train.tune.fit_map import fit_map, map_task
from capt_train.tune.folds import Fold

_OFFSETS = tuple(step / 4 for step in range(-32, 33))  # δ in nats
# Of each group of judging images, the NLL of each image and the accuracy
CandidateLosses = dict[Candidate, dict[str, tuple[Tensor, float]]]


@dataclass(frozen=True)
class Judgement:
    """How the best candidate of a family does on held-out images.

    `tuned` are images of classes that were tuned on, `new` images of classes that were left out.
    """

    candidate: Candidate
    accuracy_tuned: float | None
    accuracy_new: float | None
    nll: float  # calibrated, nats; the mean of both groups where both are judged
    behind: float  # difference from the lowest NLL
    error: float  # standard error of that difference

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**vars(self), "candidate": self.candidate.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Judgement":
        """Read the JSON form.

        Raises:
            TypeError, KeyError, ValueError: values of wrong form.
        """
        return cls(**{**values, "candidate": Candidate.from_dict(values["candidate"])})


@dataclass(frozen=True)
class Fitted:
    """Everything that was fitted on one fold, in the memory of the CPU, where it is judged."""

    fold: Fold
    before: Mapping[bool, Float[Tensor, "prompts classes dim"]]  # without and with a prompt
    texts: dict[tuple[bool, str | None, float], Float[Tensor, "classes dim"]]  # behind the maps
    rows: Discriminant  # of the classes inside

    def beside(self, candidate: Candidate, outside: Outside) -> Float[Tensor, "held classes"]:
        """Return the logits with tuned and new classes set beside each other."""
        fold = self.fold
        texts = self.texts[candidate.prompt, candidate.side, candidate.ridge]
        shift = outside.applied(ClassRows.from_texts(texts), fold.inside.tolist())
        moved = shift.logits(fold.images, fold.task.scale)
        moved -= fold.task.scale * fold.images @ texts.T
        return self.logits(candidate) + moved

    def logits(self, candidate: Candidate) -> Float[Tensor, "held classes"]:
        """Return scaled logits of the judging images over all tuned classes of the run."""
        texts = self.texts[candidate.prompt, candidate.side, candidate.ridge]
        return self._logits(candidate, texts, self.rows)

    def _logits(
        self, candidate: Candidate, texts: Float[Tensor, "classes dim"], rows: Discriminant
    ) -> Float[Tensor, "held classes"]:
        fold = self.fold
        logits = fold.task.scale * fold.images @ texts.T
        if candidate.weight:
            logits[:, fold.inside] += candidate.weight * (fold.images @ rows.weight.T + rows.bias)
        return logits

    def with_photos(
        self, candidate: Candidate, kept: Bool[Tensor, " photos"]
    ) -> Float[Tensor, "held classes"]:
        """Return the logits of a map and rows that fit some of the fold's photos.

        A prompt stays as all of the fold's photos have tuned it.
        """
        fold = self.fold
        task = fold.task.with_rows(kept).with_new_bank()
        texts = self.texts[candidate.prompt, candidate.side, candidate.ridge]
        if candidate.side is not None:
            before = self.before[candidate.prompt]
            part = map_task(task, before[:, fold.inside])
            matrix = fit_map(part, candidate.side, candidate.ridge)
            texts = mapped(before, matrix).mean(dim=0).cpu()
        rows = discriminant(task.train.embeddings, task.labels, len(task.tuned))
        return self._logits(candidate, texts, rows)


def is_ahead(first: str, second: str, table: Sequence[Judgement]) -> bool:
    """Tell whether the best candidate with one part is ahead of the best with another."""
    best = [
        min((row.nll for row in table if part in row.candidate.family), default=math.inf)
        for part in (first, second)
    ]
    return best[0] < best[1]


def judge(
    fits: Sequence[Fitted], listed: Sequence[Candidate], images: int, losses: CandidateLosses
) -> tuple[tuple[Judgement, ...], Candidate]:
    """Return the table of families and the chosen candidate, the simplest if nothing judges.

    `losses` are those of candidates judged before; those of the others are added.
    """
    groups = [name for name in ("tuned", "new") if any(f.fold.group(name).any() for f in fits)]
    if not groups:
        return (), listed[0]
    for candidate in listed:
        if candidate not in losses:
            losses[candidate] = _judging_losses(fits, candidate, groups, images)
    score = {
        c: sum(float(loss.mean()) for loss, _ in losses[c].values()) / len(groups) for c in listed
    }
    best: dict[tuple[str, ...], Candidate] = {}
    for candidate in listed:  # simple families first
        family = candidate.family
        if family not in best or score[candidate] < score[best[family]]:
            best[family] = candidate
    winner = min(best.values(), key=score.__getitem__)
    table = []
    for candidate in best.values():
        differences = [losses[candidate][name][0] - losses[winner][name][0] for name in groups]
        variance = sum(float(d.var()) / len(d) for d in differences if len(d) > 1)
        right = {name: hits for name, (_, hits) in losses[candidate].items()}
        table.append(
            Judgement(
                candidate,
                right.get("tuned"),
                right.get("new"),
                score[candidate],
                score[candidate] - score[winner],
                variance**0.5 / len(groups),
            )
        )
    closed_form = [row.nll for row in table if {*row.candidate.family} <= {"rows"}]
    floor = min(closed_form, default=math.inf)
    chosen = next(row for row in table if row.behind <= row.error and row.nll <= floor)
    # what follows is trained by all processes in step
    return agreed((tuple(table), chosen.candidate))


def _judging_losses(
    fits: Sequence[Fitted], candidate: Candidate, groups: Sequence[str], images: int
) -> dict[str, tuple[Float[Tensor, " judging"], float]]:
    """Return of each group every image's calibrated NLL, the mean over the folds, and accuracy."""
    sums, times, hits = (
        {name: torch.zeros(images, dtype=torch.double) for name in groups} for _ in range(3)
    )
    for fit in fits:
        whole = fit.logits(candidate)
        for name in groups:
            chosen, columns = fit.fold.group(name), fit.fold.columns(name)
            if not chosen.any():
                continue
            logits = whole[chosen][:, columns]
            labels = torch.searchsorted(columns, fit.fold.labels[chosen])
            places = fit.fold.places[chosen]
            sums[name][places] += calibrated_losses(logits, labels).double()
            hits[name][places] += (logits.argmax(dim=1) == labels).double()
            times[name][places] += 1
    seen = {name: times[name] > 0 for name in groups}
    return {
        name: (
            sums[name][chosen] / times[name][chosen],
            float((hits[name][chosen] / times[name][chosen]).mean()),
        )
        for name, chosen in seen.items()
    }


def fit_outside(fits: Sequence[Fitted], candidate: Candidate) -> Outside:
    """Return γ, which gives both groups one temperature, and the δ that then tells them apart best.

    Each is fitted on images of tuned and of left-out classes.
    """
    temperatures = {}
    for name in ("tuned", "new"):
        logs = []
        for fit in fits:
            chosen, columns = fit.fold.group(name), fit.fold.columns(name)
            if chosen.any() and len(columns) > 1:
                labels = torch.searchsorted(columns, fit.fold.labels[chosen])
                logits = fit.logits(candidate)[chosen][:, columns]
                logs.append(math.log(fit_temperature(logits, labels)))
        if not logs:
            return UNCHANGED
        temperatures[name] = math.exp(fmean(logs))
    scale = temperatures["tuned"] / temperatures["new"]

    def loss(offset: float) -> float:
        outside = Outside(scale, offset)
        return fmean(
            float(
                functional.cross_entropy(
                    fit.beside(candidate, outside) / temperatures["tuned"], fit.fold.labels
                )
            )
            for fit in fits
        )

    return Outside(scale, min(_OFFSETS, key=loss))
