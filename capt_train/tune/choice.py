"""Choose prompt, map and rows on held-out photos and held-out classes (METHOD 5c, ours)."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from capt_deploy.core.console import progress, say
from capt_deploy.core.errors import RunError
from capt_train.calibrate.learning_curve import (
    SHARES,
    Hits,
    LearningCurve,
    fit_curve,
    mean_hits,
    thinned,
)
from capt_train.method.class_map import mapped
from capt_train.method.class_rows import UNCHANGED, Outside, discriminant
from capt_train.method.learner import Learner
from capt_train.tune.candidates import Candidate, candidates
from capt_train.tune.epochs import train_epochs
from capt_train.tune.fit_map import fit_maps, map_task
from capt_train.tune.folds import Fold, make_folds
from capt_train.tune.judging import (
    CandidateLosses,
    Fitted,
    Judgement,
    fit_outside,
    is_ahead,
    judge,
)
from capt_train.tune.stages import TuningTask

# Classes that candidates are compared on, drawn by seed; more would hardly decide otherwise, and
# the time grows with their square
_MOST_COMPARED = 1000
_FEWEST_CLASSES = 4  # two to tune on and two to hold out
_MOST_PROBED = 200_000  # images × classes; more would take minutes
_PROBE_C = 100.0  # inverse ridge of the logistic regression; embeddings have unit norm


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, the table behind it, and out-of-fold logits."""

    chosen: Candidate
    outside: Outside  # fitted on classes that were left out
    table: tuple[Judgement, ...]  # the best candidate of each family, simple families first
    linear_probe: float | None  # accuracy of a logistic regression on tuned classes
    images: Mapping[str, int]  # how many images judged: tuned, new
    # Scaled logits of the chosen candidate over the tuned classes, each row by a fold that has not
    # seen the image. Where photos are too few to judge tuned classes, by a fold that has not even
    # seen the class.
    out_of_fold: Float[Tensor, "judging classes"]
    judging: Int[Tensor, " judging"]  # the training images of these rows
    curve: LearningCurve | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the logits."""
        return {
            "chosen": self.chosen.to_dict(),
            "outside": vars(self.outside),
            "table": [row.to_dict() for row in self.table],
            "linear_probe": self.linear_probe,
            "images": dict(self.images),
            "learning_curve": self.curve and self.curve.to_dict(),
        }

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        out_of_fold: Float[Tensor, "judging classes"],
        judging: Int[Tensor, " judging"],
    ) -> "Choice":
        """Read the JSON form.

        Raises:
            TypeError, KeyError, ValueError: values of wrong form.
        """
        return cls(
            Candidate.from_dict(values["chosen"]),
            Outside(**values["outside"]),
            tuple(map(Judgement.from_dict, values["table"])),
            values["linear_probe"],
            dict(values["images"]),
            out_of_fold,
            judging,
            values["learning_curve"] and LearningCurve.from_dict(values["learning_curve"]),
        )


def choose(
    task: TuningTask,
    make: Callable[[tuple[int, ...]], Learner],
    class_names: Sequence[str],
    *,
    new_classes: bool,
) -> Choice:
    """Tune all candidates on folds and keep the simplest that is within one standard error.

    A fold leaves out some photos of each class and, with `new_classes`, some classes as well. Each
    photo is held out once, by a fold that was tuned on its class; validation images judge every
    fold. A class with a single photo always keeps it. Where nothing else judges (one photo a class,
    no validation images), held-out classes judge what is known of names, and the rows get a fixed
    small weight. Of more than 1000 classes, that many are drawn for the comparison, and one fold of
    all classes gives the out-of-fold logits.

    The chosen candidate is never behind zero-shot or the rows alone.

    Args:
        task: all images of the run.
        make: returns a new learner for the given classes.
        class_names: of the tuned classes.
        new_classes: whether classes without photos matter, as with `--classes base`.
    """
    config, compared = task.config, _compared(task)
    judged = len(compared.val) > 0 or bool((compared.labels.bincount() > 1).any())
    enough = len(compared.tuned) >= _FEWEST_CLASSES
    folds = list(make_folds(compared, held_classes=enough and (new_classes or not judged)))
    listed = candidates(config, judged=judged)
    # a map behind a prompt is tried only where a prompt alone is ahead of a map alone
    behind = [candidate for candidate in listed if candidate.prompt and candidate.side]
    alone = [candidate for candidate in listed if candidate not in behind] or behind
    images = len(compared.train) + len(compared.val)
    fitted = _fit_all(folds, alone, make, "comparing on held-out photos")
    losses: CandidateLosses = {}
    table, chosen = judge(fitted, alone, images, losses)
    if alone is not behind and behind and is_ahead("prompt", "map", table):
        for fit in fitted:
            _fit_maps(fit, behind)
        table, chosen = judge(fitted, listed, images, losses)

    def again(task: TuningTask, *, held_classes: bool, most: int | None = None) -> list[Fitted]:
        folds = list(islice(make_folds(task, held_classes=held_classes), most))
        return _fit_all(folds, [chosen], make, "fitting what is kept to other folds")

    counts = dict.fromkeys(("tuned", "new"), 0)
    # only folds of all classes answer as the final model will
    whole = fitted
    if compared is not task:  # one of many classes, with none held out unless only those judge
        whole = again(task, held_classes=not judged, most=1)
    elif new_classes and judged and not len(task.val):
        whole = again(task, held_classes=False)
    logits, rows = [], []
    for fit in whole:
        group = fit.fold.group("tuned") if judged else fit.fold.group("new")
        photos = group & (fit.fold.places < len(task.train))
        logits.append(fit.logits(chosen)[photos].cpu())
        rows.append(fit.fold.places[photos])
    judging, order = torch.cat(rows).sort()
    for name in counts:
        groups = [fit.fold.places[fit.fold.group(name)] for fit in fitted]
        counts[name] = len(torch.cat(groups).unique())
    probe = _linear_probe([fit.fold for fit in fitted])
    curve = _learning_curve(whole, chosen, task, class_names)
    outside = UNCHANGED
    if judged and enough:
        if not new_classes:
            fitted = again(compared, held_classes=True)
        outside = fit_outside(fitted, chosen)
    out_of_fold = torch.cat(logits)[order]
    return Choice(chosen, outside, table, probe, counts, out_of_fold, judging, curve)


def _compared(task: TuningTask) -> TuningTask:
    """Return the task with the classes that candidates are compared on: all, or some of many."""
    classes = len(task.tuned)
    if classes <= _MOST_COMPARED:
        return task
    say(
        f"note: held-out photos are judged on {_MOST_COMPARED:,} of the {classes:,} classes, drawn "
        "by seed: all would take hours"
    )
    draw = torch.Generator().manual_seed(task.config.seed)
    drawn = torch.zeros(classes, dtype=torch.bool)
    drawn[torch.randperm(classes, generator=draw)[:_MOST_COMPARED]] = True
    return task.among(drawn).with_new_bank()


def _fit_all(
    folds: Sequence[Fold],
    listed: Sequence[Candidate],
    make: Callable[[tuple[int, ...]], Learner],
    label: str,
) -> list[Fitted]:
    """Fit the candidates on each fold."""
    fitted = []
    with progress(label, len(folds), "folds") as counter:
        for fold in folds:
            fitted.append(_fit(fold, listed, make))
            counter.advance(1)
    return fitted


def _fit(
    fold: Fold, listed: Sequence[Candidate], make: Callable[[tuple[int, ...]], Learner]
) -> Fitted:
    """Fit everything that the candidates need on one fold.

    Raises:
        RunError: a prompt diverges.
    """
    task, before = fold.task, {False: fold.reference[None]}
    if any(candidate.prompt for candidate in listed):
        learner = make(task.tuned)
        try:
            train_epochs(learner, task)
        except FloatingPointError as cause:
            raise RunError(
                f"comparing on held-out photos: {cause}; lower tuning.learning_rate"
            ) from cause
        with torch.no_grad():
            before[True] = learner.texts(fold.classes).embeddings.float()
    texts: dict[tuple[bool, str | None, float], Tensor] = {
        (key, None, 0.0): value.mean(dim=0).cpu() for key, value in before.items()
    }
    rows = discriminant(task.train.embeddings, task.labels, len(task.tuned))
    fitted = Fitted(fold, before, texts, rows)
    _fit_maps(fitted, listed)
    return fitted


def _fit_maps(fitted: Fitted, listed: Sequence[Candidate]) -> None:
    """Add the class embeddings behind the maps of the candidates."""
    fold, ridges = fitted.fold, defaultdict[tuple[bool, str], dict[float, None]](dict)
    for candidate in listed:
        if candidate.side is not None:
            ridges[candidate.prompt, candidate.side][candidate.ridge] = None
    for (prompt, side), needed in ridges.items():
        before = fitted.before[prompt]
        task = map_task(fold.task, before[:, fold.inside])
        for ridge, matrix in fit_maps(task, side, needed).items():
            fitted.texts[prompt, side, ridge] = mapped(before, matrix).mean(dim=0).cpu()


def _learning_curve(
    fits: Sequence[Fitted], chosen: Candidate, task: TuningTask, class_names: Sequence[str]
) -> LearningCurve | None:
    """Return the curve through the folds and through the same folds with fewer photos.

    None where photos do not change the answers: zero-shot, or a prompt alone.
    """
    if chosen.side is None and not chosen.weight:
        return None
    draw = np.random.default_rng(task.config.seed)
    labels = torch.cat([task.labels, task.val.labels_among(task.tuned)]).numpy()
    points: list[tuple[float, Hits]] = []
    judged: NDArray[np.integer] = np.arange(0)
    for share in (*SHARES, 1.0):
        sizes, folds = [], []
        for fit in fits:
            fold = fit.fold
            group, columns = fold.group("tuned"), fold.columns("tuned")
            kept = thinned(fold.task.labels.numpy(), share, draw)
            logits = fit.logits(chosen)
            if not kept.all():
                logits = fit.with_photos(chosen, torch.from_numpy(kept))
            best = columns[logits[group][:, columns].argmax(dim=1)]
            folds.append((fold.places[group].numpy(), (best == fold.labels[group]).numpy()))
            sizes.append(kept.sum() / len(fold.task.tuned))
        judged, hits = mean_hits(len(labels), folds)
        points.append((float(np.mean(sizes)), hits))
    counts = task.labels.bincount(minlength=len(task.tuned)).numpy()
    return fit_curve(points, labels[judged], counts, class_names, task.config.seed)


def _linear_probe(folds: Sequence[Fold]) -> float | None:
    """Return the accuracy of a logistic regression on the frozen embeddings, on tuned classes.

    None where it would take minutes, or where nothing judges.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if max(len(fold.task.train) * len(fold.task.tuned) for fold in folds) > _MOST_PROBED:
        return None
    hits = []
    for fold in folds:
        judged = fold.group("tuned")
        if judged.any():
            probe = LogisticRegression(C=_PROBE_C, max_iter=100, tol=1e-3)
            labels = fold.inside.nonzero().squeeze(1)[fold.task.labels]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                probe.fit(fold.task.train.embeddings.numpy(), labels.numpy())
            predicted = torch.from_numpy(probe.predict(fold.images[judged].cpu().numpy()))
            hits.append((predicted == fold.labels[judged]).double())
    return float(torch.cat(hits).mean()) if hits else None
