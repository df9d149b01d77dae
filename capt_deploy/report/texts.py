"""Tables and sentences that the page and the Markdown have in common."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capt_deploy.evaluation.summary import worse_than_zero_shot
from capt_deploy.report.contents import Contents
from capt_deploy.report.data import ReportData
from capt_deploy.report.measure import ACCURACIES, Model
from capt_deploy.report.promises import Promise

NONE = "–"
ACCURACY = "accuracy,\N{NO-BREAK SPACE}%"
CONFIDENCE = "mean confidence,\N{NO-BREAK SPACE}%"
ZERO_SHOT_ACCURACY = f"zero-shot {ACCURACY}"
SCOPE_NAMES = {
    "base": "base",
    "new": "new",
    "harmonic_mean": "harmonic",
    "all": "all",
}


@dataclass(frozen=True)
class Cell:
    """A figure, and one that it is to be read with."""

    text: str
    beneath: str = ""


@dataclass(frozen=True)
class Columns:
    """Neighbouring columns of the headline table."""

    title: str
    scopes: Sequence[str]


def headline(contents: Contents) -> tuple[list[Columns], list[tuple[str, list[Cell]]]]:
    """Return columns, and for each model its name and cells."""
    scopes = list(contents.main.after)
    accuracies = [name for name in ACCURACIES if name in scopes]
    if contents.main.report["harmonic_mean"] is not None:
        accuracies.insert(2, "harmonic_mean")
    columns = [
        Columns("Accuracy, %", accuracies),
        Columns("Calibration error (ECE-15), %", scopes),
        Columns("Negative log-likelihood", scopes),
    ]
    rows = []
    for model in contents.models:
        cells = [_accuracy(model, name) for name in accuracies]
        cells += [_calibration_error(model, scope) for scope in scopes]
        cells += [Cell(f"{model.report[scope]['nll']:.3f}") for scope in scopes]
        rows.append((model.name, cells))
    return columns, rows


def _accuracy(model: Model, name: str) -> Cell:
    found = model.report[name]
    value = found if name == "harmonic_mean" else found["accuracy"]
    low, high = model.intervals[name]
    return Cell(percent(value), f"{percent(low)}–{percent(high)}")


def _calibration_error(model: Model, scope: str) -> Cell:
    mean, quantile = model.chance[scope]
    return Cell(
        percent(model.report[scope]["ece_15"]), f"chance {percent(mean)}–{percent(quantile)}"
    )


def headline_caption(contents: Contents) -> str:
    """Say how to read the headline table."""
    images = ", ".join(
        f"{SCOPE_NAMES[scope]}: {part['n']:,}"
        for scope in contents.main.after
        for part in [contents.main.report[scope]]
    )
    text = (
        f"Images: {images}. Beneath an accuracy: the range that very many such images would put it "
        "in, right in 95 of 100 cases. Beneath a calibration error: what chance alone gives a "
        "perfectly calibrated model that is as confident as this one, from its average to what 95 "
        "of 100 cases stay below; an error up to there is no sign of a fault."
    )
    if len(contents.main.after) > 1:
        text += (
            " Base are the classes tuned on, new the others, each measured on its own images and "
            "among its own classes; all means all images among all classes; harmonic is the "
            "harmonic mean of base and new."
        )
    return text


PROMISES = (
    "Wanted of the bundle, and what came of it on these images, among all classes. A set should "
    "hold the true class as often as wanted; of what is accepted at least the wanted share should "
    "be right. Both are promised for images like the validation images, of classes tuned on."
)


def recovery(contents: Contents) -> str | None:
    """Say what tuning repaired and what it broke; None without a zero-shot model."""
    counts = contents.main.report["confusion"]["counts"]
    if counts is None:
        return None
    return (
        f"Among the classes tuned on, zero-shot mistakes a class for the other of a mined pair in "
        f"{counted(counts['zero_shot_errors_in_pairs'])}: {contents.main.name} is right on "
        f"{counts['recovered']:,} of them. Zero-shot is right on "
        f"{counted(counts['zero_shot_right'])}: {contents.main.name} is wrong on "
        f"{counts['broken']:,} of them."
    )


def notes(data: ReportData, contents: Contents) -> list[str]:
    """Return what a reader has to know before the figures."""
    return [*data.notes, *worse_than_zero_shot(contents.main.report)]


def class_table(contents: Contents) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of classes; the first column is the class."""
    both = len({row.tuned for row in contents.classes}) > 1
    before = contents.zero_shot is not None
    header = ["class", *(["part"] if both else []), "images", ACCURACY, CONFIDENCE]
    header += [*([ZERO_SHOT_ACCURACY] if before else []), "most frequent mistake"]
    rows = []
    for row in contents.classes:
        part = ["base" if row.tuned else "new"] if both else []
        figures = [f"{row.images:,}", percent(row.accuracy), percent(row.confidence)]
        figures += [percent(row.zero_shot)] if before else []
        mistake = f"{row.mistake} ({row.mistaken:,})" if row.mistake else NONE
        rows.append([row.name, *part, *figures, mistake])
    return header, rows


def pair_table(contents: Contents) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the most confused pairs."""
    before = contents.zero_shot is not None
    header = ["true class", "taken for", *(["zero-shot"] if before else []), contents.main.name]
    header.append("mined")
    return header, [
        [
            *(pair.true, pair.predicted),
            *([f"{pair.zero_shot:,}"] if before else []),
            *(f"{pair.main:,}", "yes" if pair.mined else ""),
        ]
        for pair in contents.pairs
    ]


def promise_table(contents: Contents) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of what was promised, a column for each scope."""
    scopes = list(dict.fromkeys(own.scope for own in contents.promises))
    wanted = list(dict.fromkeys((own.kind, own.wanted) for own in contents.promises))
    names = {"coverage": "sets that hold it in {} %", "accuracy": "answers {} % right"}
    cells = {(own.kind, own.wanted, own.scope): _promise(own) for own in contents.promises}
    rows = [
        [names[kind].format(percent(share)), *(cells[kind, share, scope] for scope in scopes)]
        for kind, share in wanted
    ]
    return ["wanted", *(SCOPE_NAMES[scope] for scope in scopes)], rows


def _promise(own: Promise) -> str:
    if own.kind == "coverage":
        return f"{percent(own.found)} %, {own.size:.1f} classes"
    if own.accepted is None:
        return "cannot be promised"
    right = "" if own.found is None else f", {percent(own.found)} % of them right"
    return f"{percent(own.accepted)} % accepted{right}"


def flattened(value: Any, *path: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of everything in a nested value; lists are one text."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flattened(inner, *path, str(key))
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield " / ".join(path), text


def counted(images: int) -> str:
    """Return so many images."""
    return f"{images:,} image{'' if images == 1 else 's'}"


def percent(share: float | None) -> str:
    """Return a share as percents, without the sign."""
    return NONE if share is None else f"{100 * share:.1f}"
