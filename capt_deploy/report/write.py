"""Write a report: `report.html`, `report.md` and `report.json`."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from capt_deploy.core.errors import ConfigError
from capt_deploy.core.files import write_bytes, write_json
from capt_deploy.core.install import require_packages
from capt_deploy.core.version import __version__
from capt_deploy.evaluation.evaluate import Evaluation
from capt_deploy.report.confusions import count_confusions
from capt_deploy.report.gallery import CardGroup
from capt_deploy.report.measure import MeasuredModel
from capt_deploy.report.page import MADE_BY, render_html, render_markdown
from capt_deploy.report.promises import Promise
from capt_deploy.report.results import Results, find_results

FILES = ("report.json", "report.md", "report.html")
_START = 2000  # bytes in which a file says who made it


def check_folder(folder: Path) -> None:
    """Make sure, before time is spent, that a report can be written to a folder.

    Raises:
        ConfigError: the folder holds anything but an earlier report or cannot be written to, or
            a package is missing.
    """
    require_packages("--report", "plot", "matplotlib", "jinja2")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder for the report, came a file")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{folder}: expected {parent} to be a folder that can be written to")
    # Hidden files, as desktops leave them, are never written to.
    visible = [file for file in folder.glob("*") if not file.name.startswith(".")]
    foreign = [file.name for file in visible if not _is_report(file)]
    if foreign:
        raise ConfigError(
            f"{folder}: expected a new folder or one with an earlier report, came one with "
            f"{', '.join(sorted(foreign)[:3])}; choose another, so that nothing gets lost"
        )


def _is_report(file: Path) -> bool:
    if file.name not in FILES or not file.is_file():
        return False
    with file.open("rb") as opened:
        return MADE_BY.encode() in opened.read(_START)


def write_report(evaluation: Evaluation, title: str, folder: Path) -> Path:
    """Write the report and return the page's path; each file is written atomically.

    Raises:
        CaptError: see `check_folder` and `find_results`.
        TypeError: the provenance holds what JSON cannot.
    """
    check_folder(folder)
    results = find_results(evaluation, title)
    html, markdown = render_html(results), render_markdown(results)
    write_json(folder / "report.json", as_json(results))
    write_bytes(folder / "report.md", markdown.encode())
    write_bytes(folder / "report.html", html.encode())
    return folder / "report.html"


def as_json(results: Results) -> dict[str, Any]:
    """Return all figures for JSON, without pictures; what is not defined is None."""
    evaluation = results.evaluation
    counts, _ = count_confusions(results.predictions)
    errors = sorted(cell for cell in counts if cell[0] != cell[1])
    return {
        "made_by": f"{MADE_BY} {__version__}",
        "title": results.title,
        "main": results.main.name,
        "class_names": evaluation.class_names,
        "tuned": list(map(bool, evaluation.tuned)),
        "models": [_model(model) for model in results.models],
        "confused_pairs": [asdict(pair) for pair in results.pairs],
        "confusions": {
            "true": [true for true, _ in errors],
            "predicted": [predicted for _, predicted in errors],
            "images": [counts[cell] for cell in errors],
        },
        "gallery": [_group(group) for group in results.gallery],
        "promises": [_promise(promise) for promise in results.promises],
        "classes": [asdict(row) for row in results.classes],
        "provenance": evaluation.provenance,
        "notes": evaluation.notes,
    }


def _model(model: MeasuredModel) -> dict[str, Any]:
    return {
        "name": model.name,
        **model.report,
        "accuracy_intervals": model.intervals,
        "chance_ece_15": {
            scope: {"mean": mean, "quantile_95": quantile}
            for scope, (mean, quantile) in model.chance.items()
        },
        "reliability": {
            scope: {
                "uncalibrated": _lists(asdict(model.before[scope])),
                "calibrated": _lists(asdict(after)),
            }
            for scope, after in model.after.items()
        },
        "risk_coverage": {
            scope: _lists({"coverage": coverage, "risk": risk})
            for scope, (coverage, risk) in model.risks.items()
        },
    }


def _group(group: CardGroup) -> dict[str, Any]:
    cards = [
        {
            "file": card.file,
            "true": card.true,
            "probabilities": {name: dict(shares) for name, shares in card.top_classes.items()},
        }
        for card in group.cards
    ]
    return {"title": group.title, "images": group.images, "worst": cards}


def _promise(promise: Promise) -> dict[str, Any]:
    values = asdict(promise)
    return {"wanted": values.pop("promised"), "found": values.pop("measured"), **values}


def _lists(arrays: Mapping[str, NDArray[Any]]) -> dict[str, list[Any]]:
    return {
        name: [None if isnan(value) else value for value in array.tolist()]
        for name, array in arrays.items()
    }
