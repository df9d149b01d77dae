"""Reports of `capt-eval` and `capt-train` as text."""

from collections.abc import Mapping
from typing import Any

from capt_deploy.core.console import counted, table
from capt_deploy.evaluation.evaluate import SCOPES, Report

NO_ZERO_SHOT = (
    "no figures of zero-shot: a bundle whose image encoder was tuned does not hold the frozen "
    "model; to compare with it, evaluate the run"
)
_MOST_NAMES = 3
_MOST_GAINING = 3
_LEAST_GAIN = 0.005  # in accuracy, that is worth ten photos
_STANDARD_ERRORS = 2.0  # a gain must exceed 0 by this many to be called one


def summary(report: Report) -> str:
    """Return a table of the tuned model under the zero-shot one, what tuning changed, and warnings.

    Args:
        report: from `evaluate`, with the key `skipped`.
    """
    header = ["%", "base", "new", "harmonic", "all", "ECE base", "ECE new", "ECE all"]
    rows = [
        [
            name,
            *(_percent(part[scope], "accuracy") for scope in ("base", "new")),
            percent(part["harmonic_mean"], "-"),
            _percent(part["all"], "accuracy"),
            *(_percent(part[scope], "ece_15") for scope in SCOPES),
        ]
        for name, part in (("zero-shot", report["zero_shot"]), ("tuned", report))
        if part is not None
    ]
    keep = [i for i in range(len(header)) if i == 0 or any(row[i] != "-" for row in rows)]
    lines = [table([header[i] for i in keep], [[row[i] for i in keep] for row in rows])]
    legend = "accuracy, and ECE: how far confidence and accuracy are apart on average"
    if report["base"] and report["new"]:
        legend += "; base: classes tuned on, new: the others"
    lines.append(legend)
    counts = report["confusion"]["counts"]
    lines += [NO_ZERO_SHOT] if counts is None else changes(counts)
    lines += [f"WARNING: {text}" for text in worse_than_zero_shot(report)]
    if skipped := report["skipped"]:
        names = ", ".join(path for path, _ in skipped[:_MOST_NAMES])
        more = ", …" if len(skipped) > _MOST_NAMES else ""
        left_out = counted(len(skipped), "file or folder", "files or folders")
        lines.append(f"left out {left_out}: {names}{more}")
    return "\n".join(lines)


def choice_rows(choice: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of what a run kept of prompt, map and rows, the kept one marked.

    Args:
        choice: the content of the run's `choice.json`.
    """
    kept = _family(choice["chosen"])
    rows = [
        [
            ("→ " if _family(row["candidate"]) == kept else "") + _family(row["candidate"]),
            percent(row["accuracy_tuned"], "-"),
            percent(row["accuracy_new"], "-"),
            f"{row['nll']:.3f}",
            f"{row['behind']:.3f} ± {row['error']:.3f}",
        ]
        for row in choice["table"]
    ]
    if choice["linear_probe"] is not None:
        rows.append(["logistic regression", percent(choice["linear_probe"]), "-", "-", "-"])
    header = ["held-out photos", "right, %", "new classes, %", "NLL", "behind the best"]
    keep = [0, 1, 3, 4] if all(row[2] == "-" for row in rows) else range(len(header))
    return [header[i] for i in keep], [[row[i] for i in keep] for row in rows]


def choice_notes(choice: Mapping[str, Any]) -> list[str]:
    """Return sentences on how the choice was made, and whether anything was gained."""
    tuned, new = choice["images"]["tuned"], choice["images"]["new"]
    judges = [counted(tuned, "photo") + " of classes that were tuned on"] if tuned else []
    judges += [counted(new, "photo") + " of classes that were left out"] if new else []
    if not judges:
        return ["One photo a class and no validation photos: nothing could be judged."]
    notes = [
        f"Judged by {' and '.join(judges)}, each by a tuning that had not seen it. Kept: the "
        "simplest within one standard error of the best."
    ]
    frozen = next((row for row in choice["table"] if not _family_parts(row["candidate"])), None)
    if frozen is not None and frozen["behind"] <= _STANDARD_ERRORS * frozen["error"]:
        notes.append(
            f"No gain measured over zero-shot: the NLL falls by {frozen['behind']:.3f} ± "
            f"{frozen['error']:.3f}. More photos would help, first of the classes with the fewest."
        )
    return notes


def curve_notes(curve: Mapping[str, Any]) -> list[str]:
    """Return sentences on what more photos would bring.

    Args:
        curve: the entry `learning_curve` of the run's `choice.json`.
    """
    photos, now, expected = curve["photos"][-1], curve["accuracy"][-1], curve["expected"]
    notes = [
        f"With {photos:.0f} photos a class, {percent(now)} % of held-out photos are right; with "
        f"{curve['twice']:.0f}, twice what there is, expect {percent(expected)} % "
        f"({percent(curve['low'])} to {percent(curve['high'])} %)."
    ]
    most = [row for row in curve["gains"] if row["gain"] >= _LEAST_GAIN][:_MOST_GAINING]
    if most:
        names = ", ".join(f"{row['class']} (+{percent(row['gain'])} points)" for row in most)
        notes.append(f"Ten more photos of one class gain most there: {names}.")
    return notes


def _family(candidate: Mapping[str, Any]) -> str:
    return " + ".join(_family_parts(candidate)) or "zero-shot"


def _family_parts(candidate: Mapping[str, Any]) -> list[str]:
    used = {"prompt": candidate["prompt"], "map": candidate["side"], "rows": candidate["weight"]}
    return [name for name, value in used.items() if value]


def changes(counts: Mapping[str, int]) -> list[str]:
    """Return sentences on what tuning corrects and what it breaks; none about no images.

    Args:
        counts: the entry `counts` of a report's confusion.
    """
    sentences = []
    if errors := counts["zero_shot_errors_in_pairs"]:
        sentences.append(
            f"tuning corrects {counts['recovered']:,} of the {counted(errors, 'image')} "
            f"({percent(counts['recovered'] / errors)} %) in which zero-shot makes a mistake known "
            "from training"
        )
    if right := counts["zero_shot_right"]:
        sentences.append(
            f"tuning breaks {counts['broken']:,} of the {counted(right, 'image')} "
            f"({percent(counts['broken'] / right)} %) that zero-shot gets right"
        )
    return sentences


def worse_than_zero_shot(report: Report) -> list[str]:
    """Return a sentence for every scope in which tuning lost accuracy."""
    warnings: list[str] = []
    if report["zero_shot"] is None:
        return warnings
    for scope in SCOPES:
        after, before = report[scope], report["zero_shot"][scope]
        if after and after["accuracy"] < before["accuracy"]:
            drop = f"{_percent(after, 'accuracy')} % < {_percent(before, 'accuracy')} %"
            warnings.append(f"tuned is less accurate than zero-shot on {scope} classes: {drop}")
    return warnings


def confused_pairs_table(report: Report, most: int = 8) -> str:
    """Return a table of the pairs of classes confused most often, before and after tuning."""
    rows = [
        [
            f"{pair['true']} taken for {pair['predicted']}",
            "-" if pair["zero_shot"] is None else str(pair["zero_shot"]),
            str(pair["tuned"]),
        ]
        for pair in report["confusion"]["pairs"][:most]
    ]
    return table(["confused pair (images)", "zero-shot", "tuned"], rows)


def percent(share: float | None, missing: str = "–") -> str:
    """Return a share in percent with one digit, without the sign."""
    return missing if share is None else f"{100 * share:.1f}"


def _percent(metrics: Mapping[str, Any] | None, key: str) -> str:
    return percent(metrics[key] if metrics else None, "-")
