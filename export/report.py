"""`capt-eval --report`: from scores of a run and of its exported graphs to one page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capt_deploy.bundle.read import open_bundle
from capt_deploy.confidence.decisions import Decisions
from capt_deploy.core.console import say
from capt_deploy.core.errors import ConfigError, UnavailableError
from capt_deploy.evaluation.evaluate import Pair, Scores
from capt_deploy.evaluation.scoring import BundleScores, score_bundle
from capt_deploy.report import Answers, ReportData, write_report
from capt_deploy.report.data import ZERO_SHOT

if TYPE_CHECKING:  # a bundle needs no torch
    from capt_train.run.evaluate import RunScores

_SAME = ("data_fingerprint", "model_sha256", "method", "parts", "seed", "shots")  # run and bundle


@dataclass(frozen=True)
class Asked:
    """Models asked about one split, the one that the page is about first."""

    title: str
    class_names: Sequence[str]
    tuned: Sequence[bool]
    pairs: Sequence[Pair]
    provenance: Mapping[str, Any]
    files: Sequence[Path]
    scores: Mapping[str, Scores]  # by name
    notes: tuple[str, ...] = ()
    decisions: Decisions | None = None  # of the first of them

    @property
    def data(self) -> ReportData:
        """All of it, the zero-shot model in front where it is known."""
        first = next(iter(self.scores.values()))
        models = [_answers(name, own) for name, own in self.scores.items()]
        if first.zero_shot is not None:
            frozen = Answers(ZERO_SHOT, first.zero_shot, first.zero_shot_temperature)
            models.insert(0, frozen)
        return ReportData(
            self.title,
            self.files,
            first.labels,
            self.class_names,
            self.tuned,
            models,
            self.pairs,
            self.provenance,
            self.notes,
            self.decisions,
        )


def ask_all(
    path: Path,
    data: str | Path,
    split: str,
    class_names: Path | None,
    backend: str,
) -> tuple[list[BundleScores], tuple[str, ...]]:
    """Ask every graph of a bundle that can run here; return also notes on those that cannot.

    Raises:
        UnavailableError: none of them can.
    """
    found, notes = [], []
    for precision in open_bundle(path).manifest.graphs:
        try:
            found.append(score_bundle(path, data, split, class_names, backend, precision))
        except UnavailableError as cause:
            notes.append(f"the {precision} graph cannot run here: {cause}")
            say(f"note: {notes[-1]}")
    if not found:
        raise UnavailableError(f"{path}: none of its graphs can run here: {'; '.join(notes)}")
    return found, tuple(notes)


def of_run(scored: "RunScores", name: str, title: str, notes: Sequence[str] = ()) -> Asked:
    """Return a tuned model for a page."""
    from export.source.model import provenance

    model = scored.model
    own = {"run": name, **provenance(model), "calibrated by": model.fitted.calibration.kind}
    return Asked(
        *(title, model.class_names, model.tuned, list(model.fitted.pairs), own),
        *(scored.files, {"tuned": scored.scores}),
        notes=(*notes, *_unread(len(scored.skipped)), *_seen(scored.seen)),
    )


def of_bundle(asked: Sequence[BundleScores], notes: Sequence[str], title: str) -> Asked:
    """Return the graphs of one bundle for a page."""
    first = asked[0]
    manifest = first.bundle.manifest
    calibration = {name: dict(own) for name, own in manifest.calibration.items()}
    alone = "the frozen model is not in this bundle: to compare with it, evaluate the run"
    frozen = () if first.scores.zero_shot is not None else (alone,)
    return Asked(
        title,
        manifest.class_names,
        manifest.tuned,
        first.pairs,
        {"bundle": first.bundle.path.name, **manifest.training, "calibration": calibration},
        first.files,
        {f"exported {own.precision}": own.scores for own in asked},
        (*notes, *_unread(len(first.skipped)), *frozen),
        first.bundle.decisions(),
    )


def joined(run: Asked, exported: Asked) -> Asked:
    """Return a run with its exported graphs beside it, on the images that both could read.

    Raises:
        ConfigError: the graphs are not that run's, have other classes, or no image in common.
    """
    differ = [key for key in _SAME if run.provenance.get(key) != exported.provenance.get(key)]
    if differ:
        raise ConfigError(f"--exported: not exported from this run; other {', '.join(differ)}")
    if list(run.class_names) != list(exported.class_names):
        raise ConfigError("--exported: has other classes than the run; export it without --classes")
    place = {file.resolve(): row for row, file in enumerate(exported.files)}
    pairs = [(row, place.get(file.resolve())) for row, file in enumerate(run.files)]
    rows = np.array([own for own, other in pairs if other is not None], np.int64)
    others = np.array([other for _, other in pairs if other is not None], np.int64)
    if not len(rows):
        raise ConfigError("--exported: no image could be read by both it and the run")
    return replace(
        run,
        files=[run.files[row] for row in rows],
        scores={
            **{name: _rows(own, rows) for name, own in run.scores.items()},
            **{name: _rows(own, others) for name, own in exported.scores.items()},
        },
        notes=(
            *run.notes,
            *(note for note in exported.notes if note not in run.notes),
            *_unread(len(run.files) - len(rows)),
        ),
        provenance={**run.provenance, "exported": exported.provenance},
        decisions=exported.decisions,
    )


def split_notes(split: str) -> list[str]:
    """Return what is to be said of figures on a split that was used to make the model."""
    used = {"train": "tuned on", "val": "used to choose and calibrate the model"}
    return [f"these are {split} images, which were {used[split]}"] if split in used else []


def _unread(count: int) -> list[str]:
    return [f"{count} images could not be read and are left out"] if count else []


def _seen(count: int) -> list[str]:
    return [f"{count} of the images are also among those that the run has used"] if count else []


def write(asked: Asked, folder: Path) -> None:
    """Write the page, its Markdown and its JSON; see `write_report`."""
    page = write_report(asked.data, folder)
    say(f"report written to {page}")


def _answers(name: str, scores: Scores) -> Answers:
    return Answers(
        *(name, scores.tuned, scores.temperature, scores.factors),
        top_label=scores.top_label,
        vector=scores.vector,
    )


def _rows(scores: Scores, rows: Any) -> Scores:
    zero_shot = None if scores.zero_shot is None else scores.zero_shot[rows]
    return replace(
        scores, labels=scores.labels[rows], tuned=scores.tuned[rows], zero_shot=zero_shot
    )
