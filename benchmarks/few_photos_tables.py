"""The cells of `benchmarks.few_photos` as Markdown: means over the seeds."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from capt_deploy.confidence.conformal import METHODS

WORLDS = ("clothes", "grocery", "objects")
COVERAGES, SHOTS = (0.8, 0.9, 0.95), (16, 4)
Cell = dict[str, Any]


def tables(cells: Mapping[str, Cell]) -> dict[str, str]:
    """Return the tables by their marks in docs/confidence.md."""
    by_kind: dict[str, list[Cell]] = {}
    for cell in cells.values():
        by_kind.setdefault(cell["kind"], []).append(cell)
    makers = {
        "few sets": (_sets_table, "all"),
        "few ece": (_ece_table, "all"),
        "few new": (_new_table, "base"),
        "few curve": (_curve_table, "all"),
        "few suspects": (_suspects_table, "noise"),
        "few drift": (_drift_table, "drift"),
        "few peers": (_peers_table, "peers"),
    }
    return {mark: make(by_kind[kind]) for mark, (make, kind) in makers.items() if by_kind.get(kind)}


def _groups(cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    for world in WORLDS:
        for shots in SHOTS:
            group = [c for c in cells if (c["world"], c["shots"]) == (world, shots)]
            if group:
                yield f"{world}, {shots} shots", group


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(values: Sequence[float]) -> str:
    return f"{100 * fmean(values):.1f}"


def _sets_table(cells: Sequence[Cell]) -> str:
    kinds = [(method, coverage) for method in METHODS for coverage in COVERAGES]
    header = ["coverage, % (mean size)", *(f"{m.upper()} {100 * c:.0f}" for m, c in kinds)]
    rows = []
    for name, group in _groups(cells):
        for title, kind in (("all photos", "sets"), ("a quarter set aside", "split_sets")):
            texts = []
            for method, coverage in kinds:
                found = [cell[kind][f"{method} {coverage}"] for cell in group]
                held, size = (fmean(value[place] for value in found) for place in (0, 1))
                texts.append(f"{100 * held:.1f} ({size:.1f})")
            rows.append([f"{name}: {title}", *texts])
    return _markdown(header, rows)


def _ece_table(cells: Sequence[Cell]) -> str:
    header = ["all classes tuned, %", "accuracy", "held-out", "ECE", "by chance, 95 % below"]
    header += [
        "90 % wanted: kept, of 100",
        "accepted",
        "mean familiarity",
        "seconds",
        "without curve and suspects",
    ]
    rows = [
        [
            name,
            _percent([cell["accuracy"] for cell in group]),
            _percent([cell["held_out_accuracy"] for cell in group]),
            _percent([cell["ece"] for cell in group]),
            ", ".join(_percent([cell["chance"][place] for cell in group]) for place in (0, 1)),
            f"{fmean(cell['rejection']['kept'] for cell in group):.0f}",
            _percent([cell["rejection"]["accepted"] for cell in group]),
            _percent([cell["familiarity"] for cell in group]),
            f"{fmean(cell['seconds'] for cell in group):.0f}",
            f"{fmean(cell['seconds'] - cell['extra_seconds'] for cell in group):.0f}",
        ]
        for name, group in _groups(cells)
    ]
    return _markdown(header, rows)


def _new_table(cells: Sequence[Cell]) -> str:
    scopes = ("base", "new", "all")
    rows = [
        [name, *(_percent([cell["ece"][scope] for cell in group]) for scope in scopes)]
        for name, group in _groups(cells)
    ]
    return _markdown(["ECE-15, %", "tuned", "new", "all"], rows)


def _curve_table(cells: Sequence[Cell]) -> str:
    rows = []
    for world in WORLDS:
        runs = {(c["shots"], c["seed"]): c for c in cells if c["world"] == world}
        for shots, twice in ((4, 8), (8, 16)):
            pairs = [
                (runs[shots, seed], runs[twice, seed])
                for seed in (1, 2, 3)
                if (shots, seed) in runs and (twice, seed) in runs and runs[shots, seed]["curve"]
            ]
            if pairs:
                keys = ("expected", "low", "high")
                expected, low, high = (
                    _percent([few["curve"][k] for few, _ in pairs]) for k in keys
                )
                rows.append(
                    [
                        f"{world}, {shots} → {twice} shots",
                        *(
                            f"{expected} ({low} to {high})",
                            _percent([m["accuracy"] for _, m in pairs]),
                        ),
                        _percent([many["held_out_accuracy"] for _, many in pairs]),
                    ]
                )
    return _markdown(["%", "expected of twice the photos", "measured on test", "held out"], rows)


def _suspects_table(cells: Sequence[Cell]) -> str:
    names = list(cells[0]["precision"])
    rows = [
        [
            f"{cell['world']}, seed {cell['seed']}",
            _percent([cell["wrong_share"]]),
            *(_percent([cell["precision"][name]]) for name in names if name != "flagged"),
            f"{cell['flagged']}: {_percent([cell['precision']['flagged']])}",
            _percent([cell["recall_flagged"]]),
        ]
        for cell in cells
    ]
    titles = [name for name in names if name != "flagged"]
    header = ["10 % wrong labels, %", "estimated", *titles, "flagged: of these wrong", "found"]
    return _markdown(header, rows)


def _drift_table(cells: Sequence[Cell]) -> str:
    rows = []
    for cell in cells:
        for shift, found in cell["alarms"].items():
            texts = []
            for measure in ("PSI", "martingale"):
                values = found[measure]
                share = f"{100 * values['alarms']:.0f} %"
                waited = "–" if values["median"] is None else f"{values['median']:.0f}"
                texts.append(share if shift == "no shift" else f"{waited} ({share})")
            rows.append([f"{cell['world']}: {shift}", *texts])
    return _markdown(["photos until the alarm (replays with one)", "PSI", "martingale"], rows)


def _peers_table(cells: Sequence[Cell]) -> str:
    rows = []
    for cell in cells:
        named = {**cell["peers"], "conformal-clip, first two classes": cell["two classes"]}
        for name, (accuracy, held, size) in named.items():
            texts = (_percent([accuracy]), _percent([held]), f"{size:.2f}")
            rows.append([f"{cell['world']}: {name}", *texts])
    return _markdown(
        ["90 % promised, 16 shots", "accuracy, %", "coverage, %", "classes in a set"], rows
    )
