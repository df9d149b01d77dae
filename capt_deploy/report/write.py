"""Write a report: `report.html`, `report.md` and `report.json`."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.core.errors import ConfigError
from capt_deploy.core.files import write_bytes, write_json
from capt_deploy.core.version import __version__
from capt_deploy.report.classes import confusion_counts
from capt_deploy.report.contents import Contents, find_contents
from capt_deploy.report.data import ReportData, checked
from capt_deploy.report.gallery import Group
from capt_deploy.report.markdown import markdown
from capt_deploy.report.measure import Model
from capt_deploy.report.page import MADE_BY, page
from capt_deploy.report.plots import check_plotting

FILES = ("report.json", "report.md", "report.html")
_START = 2000  # bytes in which a file says who made it


def check_folder(folder: Path) -> None:
    """Make sure, before time is spent, that a report can be written to this folder.

    Raises:
        ConfigError: it holds anything but an earlier report, it cannot be written to, or
            matplotlib is missing.
    """
    check_plotting()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder for the report, came a file")
    parent = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{folder}: {parent} is no folder that can be written to")
    # Hidden files, as desktops leave them, are never written to.
    visible = [file for file in folder.glob("*") if not file.name.startswith(".")]
    others = [file.name for file in visible if not _is_report(file)]
    if others:
        raise ConfigError(
            f"{folder}: expected a new folder or one with an earlier report, came one with "
            f"{', '.join(sorted(others)[:3])}; choose another, so that nothing gets lost"
        )


def _is_report(file: Path) -> bool:
    if file.name not in FILES or not file.is_file():
        return False
    with file.open("rb") as opened:
        return MADE_BY.encode() in opened.read(_START)


def write_report(data: ReportData, folder: Path) -> Path:
    """Write the report and return the page's path; each file is written atomically.

    Raises:
        CaptError: see `check_folder` and `checked`.
        ValueError: see `checked`.
        TypeError: the provenance holds what JSON cannot.
    """
    check_folder(folder)
    data = checked(data)
    contents = find_contents(data)
    html, text = page(data, contents), markdown(data, contents)
    write_json(folder / "report.json", as_json(data, contents))
    write_bytes(folder / "report.md", f"<!-- {MADE_BY} {__version__} -->\n\n{text}".encode())
    write_bytes(folder / "report.html", html.encode())
    return folder / "report.html"


def as_json(data: ReportData, contents: Contents) -> dict[str, Any]:
    """Return all figures for JSON; what is not defined is None, and pictures are left out."""
    counts = confusion_counts(contents.joint.labels, contents.joint.main)
    np.fill_diagonal(counts, 0)
    true, predicted = np.nonzero(counts)
    return {
        "made_by": f"{MADE_BY} {__version__}",
        "title": data.title,
        "main": contents.main.name,
        "class_names": data.class_names,
        "tuned": list(map(bool, data.tuned)),
        "models": [_model(model) for model in contents.models],
        "confused_pairs": [asdict(pair) for pair in contents.pairs],
        "confusions": _lists(
            {"true": true, "predicted": predicted, "images": counts[true, predicted]}
        ),
        "gallery": [_group(group) for group in contents.gallery],
        "promises": [asdict(own) for own in contents.promises],
        "classes": [asdict(row) for row in contents.classes],
        "provenance": data.provenance,
        "notes": data.notes,
    }


def _model(model: Model) -> dict[str, Any]:
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


def _group(group: Group) -> dict[str, Any]:
    cards = [
        {
            "file": card.file,
            "true": card.true,
            "probabilities": {name: dict(bars) for name, bars in card.bars.items()},
        }
        for card in group.cards
    ]
    return {"title": group.title, "images": group.images, "worst": cards}


def _lists(arrays: Mapping[str, NDArray[Any]]) -> dict[str, list[Any]]:
    return {
        name: [None if isnan(value) else value for value in array.tolist()]
        for name, array in arrays.items()
    }
