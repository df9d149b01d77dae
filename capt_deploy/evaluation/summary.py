"""Reports as text for people."""

from collections.abc import Mapping
from typing import Any

from capt_deploy.core.console import table
from capt_deploy.evaluation.evaluate import SCOPES, Report


def summary(report: Report) -> str:
    """Return the table of `capt-train` and `capt-eval`: tuned beside zero-shot, and a warning."""
    rows = []
    for name, part in (("zero-shot", report["zero_shot"]), ("tuned", report)):
        if part is None:
            continue
        rows.append(
            [
                name,
                *(_percent(part[scope], "accuracy") for scope in ("base", "new")),
                _share(part["harmonic_mean"]),
                _percent(part["all"], "accuracy"),
                *(_percent(part[scope], "ece_15") for scope in SCOPES),
            ]
        )
    header = ["%", "base", "new", "harmonic", "all", "ECE base", "ECE new", "ECE all"]
    keep = [i for i in range(len(header)) if i == 0 or any(row[i] != "-" for row in rows)]
    lines = [table([header[i] for i in keep], [[row[i] for i in keep] for row in rows])]
    counts = report["confusion"]["counts"]
    if counts is None:
        lines.append("the frozen model is not in this bundle: to compare with it, evaluate the run")
    else:
        lines.append(_recovery(report["confusion"], counts))
    lines += [f"WARNING: {text}" for text in worse_than_zero_shot(report)]
    if report["skipped"]:
        names = ", ".join(path for path, _ in report["skipped"][:3])
        lines.append(f"{len(report['skipped'])} images could not be read: {names}")
    return "\n".join(lines)


def _recovery(confusion: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    return (
        f"of {counts['zero_shot_errors_in_pairs']} zero-shot errors in confused pairs "
        f"{counts['recovered']} ({_share(confusion['recovered'])} %) are recovered,\n"
        f"of {counts['zero_shot_right']} right answers "
        f"{counts['broken']} ({_share(confusion['broken'])} %) are broken"
    )


def worse_than_zero_shot(report: Report) -> list[str]:
    """Return a sentence for every scope in which tuning lost accuracy."""
    warnings: list[str] = []
    if report["zero_shot"] is None:
        return warnings
    for scope in SCOPES:
        after, before = report[scope], report["zero_shot"][scope]
        if after and after["accuracy"] < before["accuracy"]:
            drop = f"{_percent(after, 'accuracy')} < {_percent(before, 'accuracy')}"
            warnings.append(f"tuned is worse than zero-shot on {scope} classes: {drop}")
    return warnings


def confused_pairs_table(report: Report, most: int = 8) -> str:
    """Return who is taken for whom how often, before and after tuning."""
    rows = [
        [
            f"{pair['true']} taken for {pair['predicted']}",
            "-" if pair["zero_shot"] is None else str(pair["zero_shot"]),
            str(pair["tuned"]),
        ]
        for pair in report["confusion"]["pairs"][:most]
    ]
    return table(["confused pair (images)", "zero-shot", "tuned"], rows)


def _percent(part: Mapping[str, Any] | None, key: str) -> str:
    return _share(part[key] if part else None)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
