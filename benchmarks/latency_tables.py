"""Tables and verdicts of `benchmarks.latency`."""

from collections.abc import Mapping
from typing import Any

from capt_deploy.core.console import table

# Times the throughput of plain open_clip in float32 on the CPU, by precision and batch.
GOALS: Mapping[tuple[str, int], float] = {
    ("fp32", 1): 1.5,
    ("bf16", 1): 2.5,
    ("bf16", 32): 2.0,
    ("int8-cpu", 1): 3.5,
    ("int8-cpu", 32): 2.5,
}
_ENOUGH = 20  # runs, for a median that one may quote
KEYS = ("backend", "device", "precision", "scope", "batch")  # of what a ratio belongs to


def text_of(name: str, cell: Mapping[str, Any]) -> str:
    """Return a table of a model's rows, and whether the goal is reached."""
    times_eager = {_key(row): row["ratio"] for row in cell["ratios"]}
    header = (name, "device", "precision", "batch", "p50 ms", "p99 ms", "images/s", "times eager")
    lines = [
        (
            *(row["backend"], row["device"], row["precision"], str(row["batch"])),
            *(f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}", f"{row['throughput_per_s']:.2f}"),
            f"{times_eager[_key(row)]:.2f}" if _key(row) in times_eager else "",
        )
        for row in cell["rows"]
    ]
    text = f"{table(header, lines)}\n{verdict(cell)}"
    few = [" ".join(line[:4]) for line, row in zip(lines, cell["rows"], strict=True) if _few(row)]
    return f"{text}; fewer than {_ENOUGH} runs: {', '.join(few)}" if few else text


def _few(row: Mapping[str, Any]) -> bool:
    return bool(row["iterations"] < _ENOUGH)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEYS)


def verdict(cell: Mapping[str, Any]) -> str:
    """Return which goals the best of our ratios reach, and whether `auto` takes the fastest."""
    ours = [
        row
        for row in cell["ratios"]
        if row["scope"] == "image_to_label" and not row["backend"].startswith("open_clip")
    ]
    parts = []
    for (precision, batch), goal in GOALS.items():
        found = [r["ratio"] for r in ours if (r["precision"], r["batch"]) == (precision, batch)]
        if found:
            reached = "reached" if max(found) >= goal else "missed"
            parts.append(f"{precision} batch {batch}: {goal} {reached} ({max(found):.2f})")
    slower = [" ".join(map(str, _key(row))) for row in ours if row["ratio"] < 1]
    parts.append(f"slower than plain open_clip: {', '.join(slower) or 'none'}")
    if (auto := cell.get("auto")) is not None:
        passed = [r for r in ours if r["batch"] == 1 and auto["gate"][r["precision"]]]
        best = max(passed, key=lambda row: float(row["ratio"]), default=None)
        if best is not None:
            parts.append(
                f"auto takes {auto['backend']} {auto['precision']}; the fastest row at batch 1 "
                f"that passed the gate is {best['backend']} {best['precision']}"
            )
    return "\n".join(parts)


def docs_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the documentation's table of images a second."""
    lines = ["| | | one at a time | times | 32 at once | times |", "|---|---|---|---|---|---|"]
    for name, cell in cells.items():
        factors = {_key(row): row["ratio"] for row in cell["ratios"]}
        rows = {_key(row): row for row in cell["rows"] if row["scope"] == "image_to_label"}
        for key in (key for key in rows if key[-1] == 1):
            pair = key, (*key[:-1], 32)
            figures = [f"{rows[k]['throughput_per_s']:.1f} | {factors[k]:.2f}" for k in pair]
            lines.append(f"| {name} | {key[0]}, {key[2]} | {' | '.join(figures)} |")
    return "\n".join(lines)


def readme_line(cell: Mapping[str, Any]) -> str:
    """Return the README's line: the best of our ratios in each precision, at batches 1 and 32."""
    best: dict[tuple[str, int], float] = {}
    for row in cell["ratios"]:
        key = row["precision"], row["batch"]
        if not row["backend"].startswith("open_clip"):
            best[key] = max(best.get(key, 0.0), row["ratio"])
    names = {"int8-cpu": "int8", "bf16": "bfloat16", "fp32": "float32"}
    figures = [
        f"{best[precision, 1]:.2f} and {best[precision, 32]:.2f} times in {name}"
        for precision, name in names.items()
    ]
    return f"{', '.join(figures)} ([table](docs/embedding.md#on-a-cpu))."
