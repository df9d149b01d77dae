"""What confidence costs where no photo is set aside: sets, rejection, calibration, suspects, drift.

    python -m benchmarks.few_photos --docs

Cells that are measured stay in benchmarks/results/few_photos.json; missing ones are measured. No
run has validation photos. The table of peers needs `pip install conformal-clip` as well.
"""

import csv
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from benchmarks.cameras import write_through
from benchmarks.cell import SHARED
from benchmarks.few_photos_tables import COVERAGES, SHOTS, WORLDS, Cell, tables
from benchmarks.record import add_cells, load_cells, write_docs
from capt_deploy.confidence.conformal import METHODS
from capt_deploy.confidence.decisions import Decisions
from capt_deploy.confidence.familiarity import negative_energy
from capt_deploy.confidence.monitor import ALARM, Monitor
from capt_deploy.confidence.rejection import RejectionTable
from capt_deploy.core.console import Command, say
from capt_deploy.core.errors import DataError
from capt_deploy.core.files import read_json
from capt_deploy.data.datasets import read_dataset
from capt_deploy.evaluation.evaluate import Scores
from capt_deploy.metrics.reliability import calibrated_ece
from capt_train import pipeline
from capt_train.config import TrainConfig
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.data.features import embed
from capt_train.data.suspects import SUSPECTS, Suspects
from capt_train.pipeline import Trained, tune_and_measure
from capt_train.run.folder import SPLIT, load_run
from capt_train.tune import choice
from export.source.decisions import decisions_from_validation
from export.source.model import source_from_run

NAME, DOCS = "few_photos", Path(__file__).parents[1] / "docs" / "confidence.md"
_MODEL = f"local-dir:{SHARED / 'models' / 'lit-efficientnet'}"
_RESAMPLINGS, _REPLAYS = 100, 40
_WRONG = 0.1  # share of labels that are replaced
_BEFORE, _AFTER = 150, 250  # photos of a replay before and after the shift
Row = tuple[str, str, str]  # path, label, split


@dataclass(frozen=True)
class Photos:
    """A copy of a world in a temporary folder, for lists of its photos."""

    folder: Path

    def rows(self, split: str) -> list[Row]:
        """Return path, label and split of all photos of a split."""
        files = sorted((self.folder / split).rglob("*.*"))
        return [(str(f.relative_to(self.folder)), f.parent.name, split) for f in files]

    def listed(self, name: str, rows: Sequence[Row]) -> str:
        """Write a list of photos as CSV and return its path."""
        path = self.folder / f"{name}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "split"), *rows])
        return str(path)


@contextmanager
def photos_of(world: str) -> Iterator[Photos]:
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "test"):
            shutil.copytree(SHARED / "data" / world / split, Path(folder) / split)
        yield Photos(Path(folder))


@click.command(cls=Command)
@click.option("--kinds", default="all,base,noise,drift,peers", show_default=True)
@click.option("--worlds", default=",".join(WORLDS), show_default=True)
@click.option("--seeds", default="1,2,3", show_default=True)
@click.option("--again", is_flag=True, help="Measure these cells anew.")
@click.option("--docs", is_flag=True, help="Write the tables into docs/confidence.md as well.")
def main(kinds: str, worlds: str, seeds: str, again: bool, docs: bool) -> None:
    """Measure what is missing, and print the tables."""
    for seed in map(int, seeds.split(",")):
        for world in worlds.split(","):
            for key, measure in _cells(kinds.split(","), world, seed):
                if again or key not in load_cells(NAME):
                    say(f"{NAME}: {key}")
                    with photos_of(world) as photos:
                        values = measure(photos)
                    kind, *_ = key.split(" / ")
                    cell = {"kind": kind, "world": world, "seed": seed, **values}
                    add_cells(NAME, {key: cell})
    for mark, table in tables(load_cells(NAME)).items():
        click.echo(f"{table}\n")
        if docs:
            write_docs(DOCS, mark, table)


def _cells(
    kinds: Sequence[str], world: str, seed: int
) -> Iterator[tuple[str, Callable[[Photos], Cell]]]:
    """Yield the cells of a world and a seed, with what measures them."""
    if "all" in kinds:
        for shots in (*SHOTS, 8):
            yield f"all / {world} / {shots} / {seed}", lambda p, n=shots: _all(p, n, seed)  # type: ignore[misc]
    if "base" in kinds and world == "objects":
        for shots in SHOTS:
            yield f"base / {world} / {shots} / {seed}", lambda p, n=shots: _base(p, n, seed)  # type: ignore[misc]
    if "noise" in kinds and world == "grocery":
        yield f"noise / {world} / {seed}", lambda p: _noise(p, seed)
    if "drift" in kinds and world in ("clothes", "grocery") and seed == 1:
        yield f"drift / {world} / {seed}", lambda p: _drift(p, world)
    if "peers" in kinds and seed == 1:
        yield f"peers / {world} / {seed}", lambda p: _peers(p, world)


@dataclass(frozen=True)
class Tuned:
    """A run and what its bundle would decide by."""

    trained: Trained
    folder: Path
    seconds: float
    extra_seconds: float  # for the learning curve and the suspects

    @property
    def scores(self) -> Scores:
        """Return the scores of the test photos."""
        return self.trained.scores.scores

    def decisions(self) -> Decisions:
        """Return the scores of the held-out photos."""
        source = source_from_run(load_run(self.folder, torch.device("cpu")))
        decisions = decisions_from_validation(source)
        assert decisions is not None
        return decisions


@contextmanager
def tuned(data: str, shots: int | None, seed: int, classes: str = "all") -> Iterator[Tuned]:
    """Tune the default and yield it; the embeddings are cached before the clock starts."""
    with tempfile.TemporaryDirectory() as folder, _timed() as extra:
        config = TrainConfig(data, _MODEL, shots=shots, seed=seed, classes=classes)
        frozen = replace(config, method="zeroshot", added=(), without=())
        tune_and_measure(frozen, Path(folder) / "frozen")
        extra.clear()
        started = time.perf_counter()
        trained = tune_and_measure(config, Path(folder) / "run")
        seconds = time.perf_counter() - started
        yield Tuned(trained, Path(folder) / "run", seconds, sum(extra))


@contextmanager
def _timed() -> Iterator[list[float]]:
    """Collect the seconds that the learning curve and the suspects take."""
    seconds: list[float] = []
    places: tuple[tuple[Any, str], ...]
    places = ((choice, "_learning_curve"), (pipeline, "write_suspects"))
    originals = [getattr(module, name) for module, name in places]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                seconds.append(time.perf_counter() - started)

        return call

    for (module, name), function in zip(places, originals, strict=True):
        setattr(module, name, timed(function))
    try:
        yield seconds
    finally:
        for (module, name), function in zip(places, originals, strict=True):
            setattr(module, name, function)


def _all(photos: Photos, shots: int, seed: int) -> Cell:
    """Measure a run on all classes, and one that sets a quarter of its photos aside."""
    test = photos.rows("test")
    with tuned(photos.listed("all", photos.rows("train") + test), shots, seed) as run:
        probabilities, labels = run.scores.among(_every(run))
        curve = run.trained.report["choice"]["learning_curve"]
        cell = {
            "shots": shots,
            "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
            "held_out_accuracy": _accuracy(run.trained.held_out.tuned, run.trained.held_out.labels),
            "curve": curve and {n: curve[n] for n in ("twice", "expected", "low", "high")},
            "seconds": run.seconds,
            "extra_seconds": run.extra_seconds,
        }
        if shots not in SHOTS:
            return cell
        decisions = run.decisions()
        right = probabilities.argmax(axis=1) == labels
        cell |= {
            "ece": run.trained.report["all"]["ece_15"],
            "chance": calibrated_ece(probabilities, bins=15, seed=0),
            "sets": _sets(decisions, probabilities, labels),
            "rejection": _rejection(decisions, probabilities.max(axis=1), right, seed),
            "familiarity": float(
                decisions.familiarity.p_value(negative_energy(_unscaled(run))).mean()
            ),
        }
        chosen = read_json(run.folder / SPLIT, DataError)["train"]
    names = run.trained.model.class_names
    parted, seen = [], dict.fromkeys(names, 0)
    for path, label, _ in chosen:
        seen[names[label]] += 1
        aside = seen[names[label]] > shots * 3 // 4
        parted.append((path, names[label], "val" if aside else "train"))
    with tuned(photos.listed("split", [*parted, *test]), None, seed) as run:
        probabilities, labels = run.scores.among(_every(run))
        split = _sets(run.decisions(), probabilities, labels)
        accuracy = float((probabilities.argmax(axis=1) == labels).mean())
    return {**cell, "split_sets": split, "split_accuracy": accuracy}


def _every(run: Tuned) -> Any:
    return np.arange(len(run.trained.model.class_names))


def _unscaled(run: Tuned) -> Any:
    return run.scores.tuned * run.scores.calibration.temperature


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())


def _sets(decisions: Decisions, probabilities: Any, labels: Any) -> Cell:
    """Return share of sets with the true class and mean size, by method and coverage."""
    found = {}
    for method in METHODS:
        for coverage in COVERAGES:
            sets = decisions.sets.sets(probabilities.astype(np.float32), coverage, method)
            held = float(sets[np.arange(len(labels)), labels].mean())
            found[f"{method} {coverage}"] = [held, float(sets.sum(axis=1).mean())]
    return found


def _rejection(decisions: Decisions, confidence: Any, right: Any, seed: int) -> Cell:
    """Return how often an accuracy of 90 % is kept on test photos, and the share accepted.

    Each resampling draws as many held-out photos with replacement.
    """
    table, draw = decisions.rejection, np.random.default_rng(seed)
    kept, accepted = 0, []
    for _ in range(_RESAMPLINGS):
        rows = draw.integers(0, len(table.confidence), len(table.confidence))
        threshold = RejectionTable(table.confidence[rows], table.correct[rows]).threshold(0.9)
        answered = np.zeros(len(right), bool) if threshold is None else confidence >= threshold
        kept += int(not answered.any() or right[answered].mean() >= 0.9)
        accepted.append(float(answered.mean()))
    threshold = table.threshold(0.9)
    answered = np.zeros(len(right), bool) if threshold is None else confidence >= threshold
    return {
        "kept": kept,
        "accepted": fmean(accepted),
        "accuracy": float(right[answered].mean()) if answered.any() else None,
        "accepted_by_all": float(answered.mean()),
    }


def _base(photos: Photos, shots: int, seed: int) -> Cell:
    """Measure calibration on tuned and new classes."""
    data = photos.listed("all", photos.rows("train") + photos.rows("test"))
    with tuned(data, shots, seed, "base") as run:
        report = run.trained.report
        return {
            "shots": shots,
            "ece": {scope: report[scope]["ece_15"] for scope in ("base", "new", "all")},
        }


def _noise(photos: Photos, seed: int) -> Cell:
    """Replace labels at random and return which share of the most suspect tenth is wrong."""
    from cleanlab.rank import get_label_quality_scores

    rows, draw = photos.rows("train"), np.random.default_rng(seed)
    names = sorted({label for _, label, _ in rows})
    wrong = set(draw.choice(len(rows), round(_WRONG * len(rows)), replace=False).tolist())
    changed = []
    for place, (path, label, split) in enumerate(rows):
        others = [name for name in names if name != label]
        name = others[draw.integers(len(others))] if place in wrong else label
        changed.append((path, name, split))
    wrong_paths = {rows[place][0] for place in wrong}
    with tuned(photos.listed("noisy", [*changed, *photos.rows("test")]), None, seed) as run:
        suspects = Suspects.load(run.folder / SUSPECTS)
        held_out, model = run.trained.held_out, run.trained.model
        count = round(_WRONG * len(suspects.labels))
        flagged = [photo.path for photo in suspects.probably_wrong]
        found = {"suspects": [photo.path for photo in suspects.labels], "flagged": flagged}
        _, probabilities = model.fitted.calibration.apply(held_out.tuned.double().numpy())
        paths = [item.path for item in held_out.items]
        for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
            quality = get_label_quality_scores(
                held_out.labels.numpy(), np.asarray(probabilities, np.float64), method=method
            )
            found[f"cleanlab {method}"] = [paths[row] for row in np.argsort(quality)]
    return {
        "wrong_share": suspects.wrong_share,
        "flagged": len(flagged),
        "precision": {
            name: fmean(path in wrong_paths for path in (ranked[:count] or [""]))
            for name, ranked in found.items()
        },
        "recall_flagged": len(wrong_paths & {*flagged}) / len(wrong_paths),
    }


def _drift(photos: Photos, world: str) -> Cell:
    """Replay test photos, then others, and return after how many each measure gives an alarm."""
    data = photos.listed("all", photos.rows("train") + photos.rows("test"))
    with tuned(data, 16, 1) as run:
        model, decisions = run.trained.model, run.decisions()
        write_through("webcam", photos.folder / "test", photos.folder / "webcam" / "test")
        other = "grocery" if world == "clothes" else "clothes"
        shifts = {
            "no shift": None,
            f"photos of {other}": _answers(run, SHARED / "data" / other),
            "another camera": _answers(run, photos.folder / "webcam"),
        }
        known = _answers(run, photos.folder)
        labels = known[0].argmax(axis=1)
        common = int(np.bincount(labels).argmax())
        shifts["only one class"] = tuple(part[labels == common] for part in known)
        names = model.class_names
        return {"alarms": {n: _replays(decisions, known, s, names) for n, s in shifts.items()}}


Answers = tuple[Any, Any]  # probabilities, logits without a temperature


def _answers(run: Tuned, folder: Path) -> Answers:
    """Return the run's answers to the test photos of a folder."""
    model, dataset = run.trained.model, read_dataset(folder)
    with closing(EmbeddingCache(model.backbone.fingerprint(), "cpu")) as cache:
        features = embed(model.backbone, cache, dataset, dataset.items("test"), "test images")
    logits = model.logits(features.embeddings).cpu().numpy()
    calibration = model.fitted.calibration
    return calibration.probabilities(logits), logits * calibration.temperature


def _replays(
    decisions: Decisions, known: Answers, shifted: Answers | None, names: Sequence[str]
) -> Cell:
    delays: dict[str, list[float]] = {"PSI": [], "martingale": []}
    for seed in range(_REPLAYS):
        draw = np.random.default_rng(seed)
        order = draw.permutation(len(known[0]))
        later = known if shifted is None else shifted
        if shifted is None:  # no photo twice
            first, second = order[:_BEFORE], order[_BEFORE : _BEFORE + _AFTER]
        else:
            first, second = order[:_BEFORE], draw.integers(0, len(later[0]), _AFTER)
        stream = [np.concatenate([a[first], b[second]]) for a, b in zip(known, later, strict=True)]
        alarms = _alarms(decisions, stream, names)
        for name, place in alarms.items():
            waited = np.inf if place is None else place - (0 if shifted is None else _BEFORE)
            delays[name].append(float(waited))
    result = {}
    for name, values in delays.items():
        after = [value for value in values if value > 0]  # earlier ones are false
        median = float(np.median(after)) if after else None
        result[name] = {
            "median": None if median is None or np.isinf(median) else median,
            "alarms": fmean(np.isfinite(value) for value in values),
            "false": fmean(value <= 0 for value in values),
        }
    return result


def _alarms(
    decisions: Decisions, stream: Sequence[Any], names: Sequence[str]
) -> dict[str, int | None]:
    """Return after how many photos each measure says that they have shifted."""
    probabilities, logits = stream
    monitor = Monitor(decisions.reference, names)
    found: dict[str, int | None] = {"PSI": None, "martingale": None}
    for place in range(0, len(probabilities), 5):
        rows = slice(place, place + 5)
        shares = probabilities[rows]
        familiarity = decisions.familiarity.p_value(negative_energy(logits[rows]))
        monitor.observe(shares.max(axis=1), shares.argmax(axis=1), None, familiarity)
        seen = monitor.summary()
        drifts = [drift for drift in (seen.confidence, seen.classes) if drift is not None]
        if found["PSI"] is None and any(drift.verdict == "shifted" for drift in drifts):
            found["PSI"] = place + 5
        if found["martingale"] is None and (seen.evidence or 0) >= ALARM:
            found["martingale"] = place + 5
    return found


def _peers(photos: Photos, world: str) -> Cell:
    """Measure other packages on the embeddings of the same 16 photos a class."""
    from mapie.classification import CrossConformalClassifier
    from sklearn.linear_model import LogisticRegression

    data = photos.listed("all", photos.rows("train") + photos.rows("test"))
    with tuned(data, 16, 1) as run:
        probabilities, labels = run.scores.among(_every(run))
        cells = {"capt": _row(run.decisions().sets.sets(probabilities, 0.9), probabilities, labels)}
        model = run.trained.model
        split = read_json(run.folder / SPLIT, DataError)["train"]
        dataset = read_dataset(data, None, model.class_names)
        items = [i for i in dataset.items("train") if i.path in {path for path, *_ in split}]
        with closing(EmbeddingCache(model.backbone.fingerprint(), "cpu")) as cache:
            train, test = (
                embed(model.backbone, cache, dataset, listed, "images")
                for listed in (items, dataset.items("test"))
            )
    few = train.embeddings.numpy(), train.labels.numpy()
    many, labels = test.embeddings.numpy(), test.labels.numpy()
    for score in ("lac", "aps"):
        peer = CrossConformalClassifier(
            LogisticRegression(C=100, max_iter=300), 0.9, score, cv=4, random_state=1
        )
        peer.fit_conformalize(*few)
        params = {"include_last_label": True} if score == "aps" else {}
        predicted, sets = peer.predict_set(many, conformity_score_params=params)
        cells[f"MAPIE, CV+, {score.upper()}"] = _row(sets[..., 0], predicted, labels)
    return {"peers": cells, "two classes": _two_classes(few, (many, labels))}


def _row(sets: Any, predicted: Any, labels: Any) -> list[float]:
    """Return accuracy, share of sets with the true class, and their mean size."""
    best = predicted.argmax(axis=1) if predicted.ndim > 1 else predicted
    held = sets[np.arange(len(labels)), labels]
    return [float((best == labels).mean()), float(held.mean()), float(sets.sum(axis=1).mean())]


class _Identity(nn.Module):
    """An image encoder for photos that are embedded already."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def encode_image(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the argument."""
        return embeddings


def _two_classes(few: tuple[Any, Any], many: tuple[Any, Any]) -> list[float]:
    """Measure conformal-clip on the first two classes; a quarter of the photos calibrates."""
    from conformal_clip import few_shot_fault_classification_conformal

    banks: list[list[torch.Tensor]] = []
    held, held_labels = [], []
    names = ("first", "second")
    for label in (0, 1):
        photos = [torch.from_numpy(x) for x in few[0][few[1] == label]]
        bank = len(photos) * 3 // 4
        banks.append(photos[:bank])
        held += photos[bank:]
        held_labels += [names[label]] * (len(photos) - bank)
    chosen = many[1] < 2
    test = [torch.from_numpy(x) for x in many[0][chosen]]
    rows = few_shot_fault_classification_conformal(
        *(_Identity(), test, [""] * len(test)),
        *(banks[0], ["first"] * len(banks[0]), banks[1], ["second"] * len(banks[1])),
        *(held, held_labels, 0.1),
        class_labels=names,
        mondrian=False,
        temperature=0.01,
    )
    sets = np.array([[name in row["prediction_set"].split("|") for name in names] for row in rows])
    best = np.array([names.index(row["point_prediction"]) for row in rows])
    return _row(sets, best, many[1][chosen])


if __name__ == "__main__":
    main()
