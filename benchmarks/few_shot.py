"""Accuracy and calibration of tuning methods, base to new, over seeds; zero-shot beside them.

    python -m benchmarks.few_shot --data ../shared/data/cifar100 \
        --model local-dir:../shared/models/tinyclip-cifar --name cifar100

`--split val` with `--set` is the way to search settings; `test` is for figures to report.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.record import describe, write_result
from capt_deploy.console import Command, print_json, say
from capt_train.cli import parse_settings
from capt_train.config import TrainConfig
from capt_train.evaluate import evaluate_run
from capt_train.pipeline import train

COLUMNS = (("base", "accuracy"), ("new", "accuracy"), ("all", "accuracy"))
CALIBRATION = (("base", "ece_15"), ("new", "ece_15"), ("all", "ece_15"))


@click.command(cls=Command)
@click.option("--data", required=True)
@click.option("--model", required=True)
@click.option("--pretrained")
@click.option("--name", required=True, help="Of the JSON file in benchmarks/results/.")
@click.option("--methods", default="zeroshot,coop,coa,tcpt,prompt", show_default=True)
@click.option("--seeds", default="1,2,3", show_default=True)
@click.option("--shots", default=16, show_default=True)
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE")
@click.option("--write/--no-write", default=True, show_default=True)
def main(
    data: str,
    model: str,
    pretrained: str | None,
    name: str,
    methods: str,
    seeds: str,
    shots: int,
    split: str,
    settings: tuple[str, ...],
    write: bool,
) -> None:
    """Tune on the base classes with every method and seed, and print mean ± std.

    Seconds are those of a whole run with all image embeddings in the cache.
    """
    rows: list[dict[str, Any]] = []
    for method in methods.split(","):
        reports = []
        for seed in (int(text) for text in seeds.split(",")):
            config = TrainConfig(
                data=data,
                model=model,
                pretrained=pretrained,
                method=method,
                classes="base",
                shots=shots,
                seed=seed,
            ).with_settings(parse_settings(settings))
            reports.append(_measure(config, split))
        rows.append({**_row(method, reports), "seconds": _mean_std(r["seconds"] for r in reports)})
        say(_markdown(rows))
    click.echo(_markdown(rows))
    result = {"split": split, "shots": shots, "seeds": seeds, "settings": settings, "rows": rows}
    if write:
        say(f"written: {write_result(name, {**describe(), **result})}")
    else:
        print_json(result)


def _measure(config: TrainConfig, split: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        # Fills the cache with this seed's images.
        train(replace(config, method="zeroshot", weights=None), Path(folder) / "first")
        started = time.perf_counter()
        report = train(config, Path(folder) / "run")
        seconds = time.perf_counter() - started
        if split != report["split"]:
            report = {**report, **evaluate_run(Path(folder) / "run", config.data, split)}
    return {**report, "seconds": seconds}


def _mean_std(values: Any) -> dict[str, float]:
    numbers = list(values)
    return {
        "mean": statistics.mean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else 0.0,
    }


def _row(method: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        f"{scope}_{metric}": _mean_std(report[scope][metric] for report in reports)
        for scope, metric in COLUMNS + CALIBRATION
    }
    row["harmonic_mean"] = _mean_std(report["harmonic_mean"] for report in reports)
    for scope in ("base", "new"):
        values = [report["uncalibrated"][scope]["ece_15"] for report in reports]
        row[f"{scope}_ece_15_uncalibrated"] = _mean_std(values)
    row["images"] = reports[0]["images"]
    return {"method": method, **row}


def _markdown(rows: list[dict[str, Any]]) -> str:
    shown = {
        "base": "base_accuracy",
        "new": "new_accuracy",
        "harmonic": "harmonic_mean",
        "all": "all_accuracy",
        "ECE base": "base_ece_15",
        "ECE new": "new_ece_15",
        "seconds": "seconds",
    }
    lines = ["| % | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for row in rows:
        cells = []
        for title, key in shown.items():
            value, unit = row.get(key), 1 if title == "seconds" else 100
            cells.append(
                f"{unit * value['mean']:.1f} ± {unit * value['std']:.1f}" if value else "-"
            )
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
