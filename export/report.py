"""Score runs and their bundles on the same images, for `capt-eval`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from capt_deploy.bundle.read import is_bundle
from capt_deploy.core.console import counted
from capt_deploy.core.errors import ConfigError
from capt_deploy.core.files import sha256_file
from capt_deploy.evaluation.evaluate import Evaluation, SuspectPhoto
from capt_deploy.evaluation.scoring import score_bundle, score_graphs
from capt_deploy.evaluation.summary import NO_ZERO_SHOT

if TYPE_CHECKING:  # a bundle needs no torch
    from capt_train.run.evaluate import RunScores

_SAME = ("data_fingerprint", "model_sha256", "method", "parts", "seed", "shots")
_USES = {"train": "to tune the model", "val": "to choose and calibrate the model"}


def score(
    path: Path,
    data: Path,
    split: str = "test",
    class_names: Path | None = None,
    backend: str = "auto",
    *,
    exported: Path | None = None,
    all_graphs: bool = False,
) -> Evaluation:
    """Score a run or a bundle on the images of a split; the options are those of `capt-eval`.

    Args:
        path: of the run or bundle.
        data: the data set.
        split: `train`, `val` or `test`.
        class_names: a file of names.
        backend: what runs bundles.
        exported: the run's bundle, to be scored beside it.
        all_graphs: score every graph of a bundle, not only the one that the backend prefers.

    Raises:
        CaptError: run, bundle, data or backend cannot be used, or they do not belong together.
    """
    if is_bundle(path):
        score_any = score_graphs if all_graphs else score_bundle
        evaluation = score_any(path, data, split, class_names, backend)
    else:
        from capt_train.run.evaluate import score_run

        scored = score_run(path, data, split, class_names)
        evaluation = _of_run(scored, path, _suspects(scored, path) if all_graphs else [])
        if exported is not None:
            file = class_names or scored.model.config.class_names  # a bundle does not know it
            names = None if file is None else Path(file)
            graphs = score_graphs(exported, data, split, names, backend)
            evaluation = _beside(evaluation, graphs)
    notes = list(evaluation.notes)
    if split in _USES:
        notes.append(f"these are {split} images, which were used {_USES[split]}")
    if evaluation.skipped:
        count = counted(len(evaluation.skipped), "file or folder", "files or folders")
        notes.append(f"left out {count}; --json names them")
    return replace(evaluation, notes=notes)


def _of_run(scored: "RunScores", run: Path, suspects: Sequence[SuspectPhoto]) -> Evaluation:
    from export.source.model import provenance

    model, notes = scored.model, []
    if scored.seen:
        photos = counted(scored.seen, "image")
        notes.append(f"the run itself has used {photos} of this split: the figures flatter it")
    return Evaluation(
        model.class_names,
        model.tuned,
        list(model.fitted.pairs),
        scored.files,
        {"tuned": scored.scores},
        [(file.path, file.reason) for file in scored.skipped],
        {
            "run": run.name,
            **provenance(model),
            "calibrated by": model.fitted.calibration.calibrator,
        },
        notes,
        suspects=suspects,
    )


def _suspects(scored: "RunScores", run: Path) -> list[SuspectPhoto]:
    """Return the photos of a run whose labels are probably wrong, as far as the data has them.

    Raises:
        RunError: the run's list of them is damaged.
    """
    from capt_train.data.suspects import SUSPECTS, Suspects

    if not (run / SUSPECTS).is_file():
        return []
    digests = scored.model.split.sha256
    photos = []
    for photo in Suspects.load(run / SUSPECTS).probably_wrong:
        file = scored.root / photo.path
        if file.is_file() and sha256_file(file) == digests.get(photo.path):
            named = f"its label, {photo.label}"
            shares = ((photo.likely, photo.p_likely), (named, photo.p_label))
            photos.append(SuspectPhoto(file, photo.label, shares))
    return photos


def _beside(run: Evaluation, graphs: Evaluation) -> Evaluation:
    """Return a run with its exported graphs beside it, on the images that both could read.

    Raises:
        ConfigError: the graphs are not that run's, have other classes, or no image in common.
    """
    differ = [key for key in _SAME if run.provenance.get(key) != graphs.provenance.get(key)]
    if differ:
        raise ConfigError(
            f"--exported: expected a bundle exported from this run, came one that differs in "
            f"{', '.join(differ)}"
        )
    if list(run.class_names) != list(graphs.class_names):
        raise ConfigError(
            "--exported: expected a bundle with the classes of the run, came other classes; "
            "export it without --classes"
        )
    graph_rows = {file.resolve(): row for row, file in enumerate(graphs.files)}
    common = [row for row, file in enumerate(run.files) if file.resolve() in graph_rows]
    if not common:
        raise ConfigError("--exported: no image could be read by both it and the run")
    files = [run.files[row] for row in common]
    in_run, in_graphs = np.array(common), np.array([graph_rows[f.resolve()] for f in files])
    unread = set(run.files) - set(files)
    lost = [(file.name, "not readable for the bundle") for file in run.files if file in unread]
    differs = {k: v for k, v in graphs.provenance.items() if run.provenance.get(k) != v}
    return replace(
        run,
        files=files,
        scores={
            **{name: scores.rows(in_run) for name, scores in run.scores.items()},
            **{name: scores.rows(in_graphs) for name, scores in graphs.scores.items()},
        },
        skipped=[*run.skipped, *lost],
        notes=[*run.notes, *(note for note in graphs.notes if note != NO_ZERO_SHOT)],
        provenance={**run.provenance, "exported": differs},
        decisions=graphs.decisions,
    )
