"""Can the confidence be believed? Calibration, sets, rejection and familiarity on test photos.

    python -m benchmarks.confidence --runs runs/confidence

For each photo set and seed, CoOp and the default are tuned on the base classes, 16 shots, and the
default is exported. Cells that are measured stay in benchmarks/results/confidence.json, runs in the
folder, where `--again` finds them.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from benchmarks.cell import World, open_world
from benchmarks.confidence_tables import (
    ACCURACIES,
    BASE,
    COVERAGES,
    NEW,
    ece_table,
    rest_table,
    sets_table,
)
from benchmarks.record import add_cells, load_cells, write_docs
from capt_deploy.bundle.read import REPORT
from capt_deploy.confidence.conformal import METHODS, ScoreTable
from capt_deploy.confidence.decisions import DecisionOptions, Decisions
from capt_deploy.confidence.distance_aware import unit_norm
from capt_deploy.confidence.familiarity import negative_energy
from capt_deploy.core.console import Command, say
from capt_deploy.core.errors import BundleError, ConfigError
from capt_deploy.core.files import read_json
from capt_deploy.data.datasets import read_dataset
from capt_deploy.evaluation.evaluate import Report
from capt_deploy.evaluation.scoring import score_bundle
from capt_deploy.metrics.calibration import softmax
from capt_deploy.metrics.probabilities import Floats, Ints
from capt_deploy.metrics.reliability import calibrated_ece
from capt_train.config import TrainConfig
from capt_train.data.features import embed
from capt_train.pipeline import train
from capt_train.run.evaluate import RunScores, score_run
from capt_train.run.folder import METRICS, TunedModel
from export.writer import ExportOptions, export_run

NAME = "confidence"
DOCS = Path(__file__).parents[1] / "docs" / "confidence.md"
WORLDS = ("objects", "cifar100")
_PRECISIONS = ("fp32", "fp16", "int8")
_SPLITS = 200


@click.command(cls=Command)
@click.option("--runs", "folder", type=click.Path(path_type=Path), help="Where runs are kept.")
@click.option("--worlds", default=",".join(WORLDS), show_default=True)
@click.option("--seeds", default="1,2,3", show_default=True)
@click.option("--again", is_flag=True, help="Measure cells anew, with the runs that exist.")
@click.option("--docs", is_flag=True, help="Write the tables into docs/confidence.md as well.")
def main(folder: Path | None, worlds: str, seeds: str, again: bool, docs: bool) -> None:
    """Measure what is missing, and print the tables."""
    for world, seed in product(worlds.split(","), map(int, seeds.split(","))):
        key = f"{world} / {seed}"
        if key in load_cells(NAME) and not again:
            continue
        say(f"{NAME}: {key}")
        with open_world(world) as place, TemporaryDirectory() as scratch:
            cell = _measure(place, (folder or Path(scratch)) / world, seed)
        add_cells(NAME, {key: {"world": world, "seed": seed, **cell}})
    cells = load_cells(NAME)
    for mark, table in (
        ("ece", ece_table(cells)),
        ("sets", sets_table(cells)),
        ("rest", rest_table(cells)),
    ):
        click.echo(f"{table}\n")
        if docs:
            write_docs(DOCS, mark, table)


def _measure(place: World, folder: Path, seed: int) -> dict[str, Any]:
    runs = {}
    for method in ("coop", "capt"):  # with the same choice of calibrations
        runs[method] = folder / f"{method}-{seed}"
        config = TrainConfig(
            *(place.data, place.model),
            method=method,
            classes="base",
            shots=16,
            seed=seed,
        )
        if not (runs[method] / METRICS).exists():
            train(config, runs[method], resume=runs[method].exists())
    coop, tuned = (score_run(runs[method], place.data) for method in ("coop", "capt"))
    before, after = coop.report(), tuned.report()
    unmapped = replace(tuned.scores.calibration, top_label=None)
    temperature = replace(tuned, scores=replace(tuned.scores, calibration=unmapped)).report()
    ece = {
        "zero-shot": _both(before["uncalibrated"]["zero_shot"]),
        "zero-shot + temperature": _both(before["zero_shot"]),
        "CoOp, uncalibrated": _both(before["uncalibrated"]),
        "CoOp": _both(before),
        "capt, uncalibrated": _both(after["uncalibrated"]),
        "capt + temperature": _both(temperature),
        "capt": _both(after),
    }
    with TemporaryDirectory() as name:
        out = Path(name) / "x.capt"
        # Graphs that the gate would refuse are measured too, and recorded as refused.
        options = ExportOptions(precisions=_PRECISIONS, gate_images=1000, force=True)
        export_run(runs["capt"], out, options=options)
        gate = read_json(out / REPORT, BundleError)["gate"]
        for precision in _PRECISIONS:
            scored = score_bundle(out, place.data, "test", None, "onnxruntime-cpu", precision)
            ece[f"capt, exported {precision}"] = _both(scored.report())
            if precision == "fp32":
                decisions = scored.decisions
    if decisions is None:
        raise ConfigError("the bundle has no scores of validation images")
    scopes = {scope: _scope(tuned, scope) for scope in (BASE, NEW)}
    return {
        "refused": {name: g["failures"] for name, g in gate.items() if g["failures"]},
        "calibrator": tuned.model.fitted.calibration.calibrator,
        "ece_15": ece,
        "chance": {s: calibrated_ece(shares)[0] for s, (shares, _) in scopes.items()},
        "sets": _sets(*scopes[BASE], seed),
        "bundle": {s: _in_use(tuned, decisions, s) for s in (BASE, NEW)},
        "familiarity": _familiarity(tuned, place),
    }


def _both(report: Report) -> dict[str, float]:
    return {scope: report[scope]["ece_15"] for scope in (BASE, NEW)}


def _scope(scored: RunScores, scope: str) -> tuple[Floats, Ints]:
    """Return probabilities among base or new classes alone, and the labels among them."""
    columns = np.flatnonzero(np.asarray(scored.model.tuned) == (scope == BASE))
    rows = np.isin(scored.scores.labels, columns)
    logits = scored.scores.tuned[rows][:, columns]
    labels = np.searchsorted(columns, scored.scores.labels[rows])
    return scored.scores.calibration.probabilities(logits), labels


def _sets(probabilities: Floats, labels: Ints, seed: int) -> dict[str, dict[str, float]]:
    """Return coverage and size over random halves: one to fit the scores, one to test them."""
    draw = np.random.default_rng(seed)
    figures: dict[str, list[tuple[float, float]]] = {}
    for _ in range(_SPLITS):
        order = draw.permutation(len(labels))
        fitting, testing = np.array_split(order, 2)
        table = ScoreTable.from_probabilities(probabilities[fitting], labels[fitting])
        for method, coverage in product(METHODS, COVERAGES):
            sets = table.sets(probabilities[testing], coverage, method)
            inside = sets[np.arange(len(testing)), labels[testing]]
            key = f"{method} {coverage}"
            figures.setdefault(key, []).append((float(inside.mean()), float(sets.sum(1).mean())))
    return {
        key: {"coverage": mean(c for c, _ in pairs), "size": mean(s for _, s in pairs)}
        for key, pairs in figures.items()
    }


def _in_use(scored: RunScores, decisions: Decisions, scope: str) -> dict[str, Any]:
    """Return what the bundle's own scores do for test images, among all classes."""
    scores = scored.scores
    rows = np.asarray(scored.model.tuned)[scores.labels] == (scope == BASE)
    logits, labels = scores.tuned[rows], scores.labels[rows]
    probabilities = scores.calibration.probabilities(logits)
    right = probabilities.argmax(axis=1) == labels
    figures: dict[str, Any] = {}
    for method, coverage in product(METHODS, COVERAGES):
        options = DecisionOptions(coverage=coverage, sets=method)
        sets = decisions.decide(probabilities, logits, options).sets
        inside = sets[np.arange(len(labels)), labels]
        figures[f"{method} {coverage}"] = {
            "coverage": float(inside.mean()),
            "size": float(sets.sum(axis=1).mean()),
        }
    for accuracy in ACCURACIES:
        threshold = decisions.rejection.threshold(accuracy)
        kept = probabilities.max(axis=1) >= (np.inf if threshold is None else threshold)
        figures[f"accuracy {accuracy}"] = {
            "accepted": float(kept.mean()),
            "accuracy": float(right[kept].mean()) if kept.any() else None,
        }
    return figures


def _familiarity(scored: RunScores, place: World) -> dict[str, dict[str, float]]:
    """Return AUROCs of test images of base classes against new ones, and against drawn pictograms.

    The model knows its base classes alone here.
    """
    model = scored.model
    tuned = np.asarray(model.tuned)
    items = _embeddings(model, place.data)
    with open_world("pictograms") as drawn:
        pictograms = _embeddings(model, drawn.data)
    known = model.validation
    if known is None:
        raise ConfigError("the run has no validation images")
    means = np.stack(
        [known.embeddings[known.labels == c].mean(dim=0).numpy() for c in model.split.tuned]
    )
    base = tuned[scored.scores.labels]
    areas: dict[str, dict[str, float]] = {}
    for name, unknown in (("new classes", items[~base]), ("pictograms", pictograms)):
        pair = [_familiar(model, part, means) for part in (items[base], unknown)]
        areas[name] = {score: _auroc(pair[0][score], pair[1][score]) for score in pair[0]}
    return areas


def _familiar(model: TunedModel, embeddings: Floats, means: Floats) -> dict[str, Floats]:
    rows = model.class_rows.rows[list(model.split.tuned)].numpy()
    logits = model.backbone.scale * embeddings @ rows.T / model.fitted.temperature
    return {
        "confidence": softmax(logits).max(axis=1),
        "largest logit": logits.max(axis=1),
        "energy": negative_energy(logits),
        "class means": (unit_norm(embeddings) @ unit_norm(means).T).max(axis=1),
    }


def _auroc(known: Floats, unknown: Floats) -> float:
    """Return how often a known image scores higher than an unknown one; ties count half."""
    ordered = np.sort(unknown)
    below = np.searchsorted(ordered, known, "left") + np.searchsorted(ordered, known, "right")
    return float(below.mean() / (2 * len(ordered)))


def _embeddings(model: TunedModel, data: str) -> Floats:
    dataset = read_dataset(data)
    items = dataset.items("test")
    features = embed(
        model.backbone, None, dataset, items, "test images", model.learner.image_embeddings
    )
    return features.embeddings.numpy()


if __name__ == "__main__":
    main()
