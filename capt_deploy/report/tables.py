"""Tables and sentences that the page and the Markdown have in common."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capt_deploy.core.console import counted
from capt_deploy.evaluation.summary import changes, choice_rows, percent, worse_than_zero_shot
from capt_deploy.report.measure import FEW, MeasuredModel
from capt_deploy.report.promises import Promise
from capt_deploy.report.results import Results

NONE = "–"
_SURE = 0.8
_MOST_ROWS = 500  # of the table of classes, which a browser has to lay out and a person to read
_ACCURACY = "accuracy, %"

Cell = tuple[str, str]  # a figure, and the range to read it with


@dataclass(frozen=True)
class Table:
    """Texts of a table; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[str] = ()  # titles of columns to be aligned to the right


def summary_line(results: Results) -> str:
    """Return the report in a few sentences: accuracy, confidence, the worst confusion."""
    labels, probabilities = results.predictions.labels, results.predictions.main
    right, confidence = probabilities.argmax(axis=1) == labels, probabilities.max(axis=1)
    share = _whole_percent(float(right.mean()))
    if results.zero_shot is not None:
        share += f"; zero-shot {_whole_percent(results.zero_shot.report['all']['accuracy'])}"
    sentences = [f"Right on {right.sum():,} of {counted(len(right), 'photo')} ({share})."]
    sure = confidence >= _SURE
    beginning = f"Where it is at least {_whole_percent(_SURE)} sure"
    if sure.sum() >= FEW:
        beginning += f" ({counted(int(sure.sum()), 'photo')}), it says"
    else:
        sure[:], beginning = True, "It says"
    sentences.append(
        f"{beginning} {_whole_percent(float(confidence[sure].mean()))} on average and is right on "
        f"{_whole_percent(float(right[sure].mean()))}."
    )
    if results.pairs:
        worst = results.pairs[0]
        photos = counted(worst.main, "photo")
        sentences.append(
            f"Most often confused: {worst.true} taken for {worst.predicted} ({photos})."
        )
    return " ".join(sentences)


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def context_line(results: Results) -> str:
    """Return how many photos and classes, and which models."""
    classes, counts = len(results.evaluation.class_names), ""
    if len(results.main.after) > 1:
        report = results.main.report
        counts = ", ".join(f"{scope} {report[scope]['n']:,}" for scope in results.main.after)
        counts = f" Photos: {counts}."
    among = counted(classes, "class", "classes")
    compared_with = [model.name for model in results.models if model is not results.main]
    compared = f"; compared with {', '.join(compared_with)}" if compared_with else ""
    return f"Model: {results.main.name}, which chooses among {among}{compared}.{counts}"


def warnings(results: Results) -> list[str]:
    """Return the warnings to show before the figures."""
    return [*results.evaluation.notes, *worse_than_zero_shot(results.main.report)]


def headline(results: Results) -> tuple[dict[str, list[str]], dict[str, list[Cell]]]:
    """Return the scopes of each figure of the headline table, and the cells of each model."""
    scopes = list(results.main.after)
    accuracies = [*scopes]
    if results.main.report["harmonic_mean"] is not None:
        accuracies.insert(2, "harmonic")
    columns = {
        "Accuracy, %": accuracies,
        "Calibration error (ECE), %": scopes,
        "Negative log-likelihood": scopes,
    }
    rows = {}
    for model in results.models:
        cells = [_accuracy(model, scope) for scope in accuracies]
        for scope in scopes:
            limit = f"chance ≤ {percent(model.chance[scope][1])}"
            cells.append((percent(model.report[scope]["ece_15"]), limit))
        rows[model.name] = cells + [(f"{model.report[scope]['nll']:.3f}", "") for scope in scopes]
    return columns, rows


def _accuracy(model: MeasuredModel, scope: str) -> Cell:
    if scope == "harmonic":
        value, (low, high) = model.report["harmonic_mean"], model.intervals["harmonic_mean"]
    else:
        value, (low, high) = model.report[scope]["accuracy"], model.intervals[scope]
    return percent(value), f"{percent(low)}–{percent(high)}"


def tuning_changes(results: Results) -> list[str]:
    """Return sentences on predictions that tuning corrected and broke; none without zero-shot."""
    counts = results.main.report["confusion"]["counts"]
    return [] if counts is None else changes(counts)


def classes_shown(results: Results) -> str:
    """Return which classes the table of classes shows."""
    shown, count = "Every class that has photos", len(results.classes)
    if count > _MOST_ROWS:
        shown = f"The {_MOST_ROWS:,} least accurate of {count:,} classes; report.json has all"
    return f"{shown}, among all classes; the least accurate first"


def class_table(results: Results) -> Table:
    """Return the figures of each class; of the least accurate ones where there are many."""
    both = len({row.tuned for row in results.classes}) > 1
    before = results.zero_shot is not None
    confidence, zero_shot = "mean confidence, %", f"zero-shot {_ACCURACY}"
    header = ["class", *(["part"] if both else []), "photos", _ACCURACY, confidence]
    header += [*([zero_shot] if before else []), "most frequent mistake"]
    rows = []
    for row in results.classes[:_MOST_ROWS]:
        part = ["base" if row.tuned else "new"] if both else []
        figures = [f"{row.images:,}", percent(row.accuracy), percent(row.confidence)]
        figures += [percent(row.zero_shot)] if before else []
        mistake = f"{row.mistake} ({row.mistaken:,})" if row.mistake else NONE
        rows.append([row.name, *part, *figures, mistake])
    return Table(header, rows, ("photos", _ACCURACY, confidence, zero_shot))


def pair_table(results: Results) -> Table:
    """Return the most confused pairs."""
    before = results.zero_shot is not None
    counts = [*(["zero-shot"] if before else []), results.main.name]
    rows = [
        [
            *(pair.true, pair.predicted),
            *([f"{pair.zero_shot:,}"] if before else []),
            *(f"{pair.main:,}", "yes" if pair.mined else ""),
        ]
        for pair in results.pairs
    ]
    return Table(["true class", "taken for", *counts, "known from training"], rows, counts)


def promise_table(results: Results) -> Table:
    """Return the promised and the measured shares, a column for each scope."""
    scopes = list(dict.fromkeys(promise.scope for promise in results.promises))
    kinds = list(dict.fromkeys((promise.kind, promise.promised) for promise in results.promises))
    cells = {
        (promise.kind, promise.promised, promise.scope): _measured(promise)
        for promise in results.promises
    }
    names = {
        "coverage": "true class in the set: {} %",
        "accuracy": "right answers: {} %",
    }
    rows = [
        [names[kind].format(f"{100 * share:g}"), *(cells[kind, share, scope] for scope in scopes)]
        for kind, share in kinds
    ]
    return Table(["promise", *(["on these photos"] if scopes == ["all"] else scopes)], rows)


def _measured(promise: Promise) -> str:
    if promise.kind == "coverage":
        return f"{promise.verdict}: {percent(promise.measured)} % ({promise.size:.1f} classes)"
    if promise.accepted is None:
        return "cannot be promised"
    if promise.measured is None:
        return "no photo is answered"
    answered = f"{percent(promise.accepted)} % answered"
    return f"{promise.verdict}: {percent(promise.measured)} % ({answered})"


def choice_table(results: Results) -> Table | None:
    """Return the table of the run's choice; None where nothing was to decide."""
    choice = results.evaluation.provenance.get("choice")
    if not choice:
        return None
    header, rows = choice_rows(choice)
    return Table(header, rows, header[1:])


def curve_table(curve: Mapping[str, Any]) -> Table:
    """Return the accuracy by the number of photos a class, the expected one last."""
    rows = [
        [f"{photos:.1f}", f"{percent(accuracy)}, on held-out photos"]
        for photos, accuracy in zip(curve["photos"], curve["accuracy"], strict=True)
    ]
    interval = f"{percent(curve['low'])}–{percent(curve['high'])}"
    rows.append([f"{curve['twice']:.1f}", f"{percent(curve['expected'])} expected ({interval})"])
    return Table(["photos a class", _ACCURACY], rows)


def flattened(value: Any, *path: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of everything in a nested value; a list is one text."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flattened(inner, *path, str(key))
    else:
        items = value if isinstance(value, list) else [value]
        texts = [item if isinstance(item, str) else json.dumps(item) for item in items]
        yield " / ".join(path), NONE if value in (None, {}) else ", ".join(texts) or NONE
