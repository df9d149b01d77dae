"""What benchmarks/gpu.sh runs: each step in a process of its own, with a time limit of its own.

A step that fails is reported and stops no other. The result is written after every step.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from benchmarks.exported import bundle_of
from benchmarks.record import RESULTS, describe
from capt_deploy.console import Command, say, table
from capt_deploy.files import write_json
from capt_deploy.machine import describe_machine, versions
from capt_deploy.nvidia import find_driver

_ROOT = Path(__file__).parents[1]
_SHARED = _ROOT.parent / "shared" / "data" / "cifar100"
ALL_SECONDS = 470.0  # of 8 minutes
_MODEL, _PRECISIONS = "ViT-B/16", ("fp16",)
_SCOPES = "device,host,image_to_label"
_TAIL = 2000  # characters kept of what a step said


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    words: tuple[str, ...]
    seconds: float  # at most
    as_json: bool = True  # what it prints on stdout


@dataclass(frozen=True)
class Done:
    """How a step went."""

    name: str
    state: str  # "ok", "exit code 1", "stopped after 60 s", "no time left"
    seconds: float
    result: Any = None  # its JSON
    said: str = ""  # the end of its output, where it failed or prints no JSON


@dataclass
class Report:
    """What is written, step by step."""

    path: Path
    about: Mapping[str, Any]
    steps: list[Done] = field(default_factory=list)

    def add(self, done: Done) -> None:
        """Add a step and write the file."""
        self.steps.append(done)
        write_json(self.path, {**self.about, "steps": [asdict(one) for one in self.steps]})


@click.command(cls=Command)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "gpu.json",
    help="By default benchmarks/results/gpu.json.",
)
@click.option("--only", help="Run only the steps whose names hold this.")
def main(out: Path, only: str | None) -> None:
    """Run all that needs an NVIDIA GPU."""
    driver = find_driver()
    if driver.problem is not None:
        say(f"not run on a GPU: {driver.problem}")
        sys.exit(2)
    report = Report(
        out,
        {
            "measured": describe(),
            "versions": versions(),
            "machine": describe_machine(),
            "cuda": driver.cuda,
        },
    )
    with TemporaryDirectory() as work:
        own = [
            one for one in steps(Path(work), photos=_SHARED.is_dir()) if (only or "") in one.name
        ]
        run_steps(own, report, ALL_SECONDS)
    click.echo(text_of(report.steps))
    say(f"wrote {out}")
    if any(one.state != "ok" for one in report.steps):
        sys.exit(1)


def steps(work: Path, *, photos: bool) -> list[Step]:
    """Return what is run, the most important first; limits add up to less than all seconds.

    Args:
        work: where bundles lie meanwhile.
        photos: whether there are those of the ablation.
    """
    bundle = bundle_of(_MODEL, work, _PRECISIONS)
    model, precisions = ("--models", _MODEL), ("--precisions", ",".join(_PRECISIONS))
    worlds = ("pictograms", "cifar100") if photos else ("pictograms",)
    tests = ("-m", "pytest", "tests/gpu", "-m", "gpu", "-p", "no:cacheprovider")
    batches, quick = ("--batch", "1,32"), ("--seconds", "1")
    return [
        Step("doctor", _command("capt_deploy.cli_doctor", "--json"), 40),
        Step("tests", (sys.executable, *tests), 80, as_json=False),
        Step(
            "export",
            _module("exported", str(work), "--model", _MODEL, *precisions),
            70,
            as_json=False,
        ),
        Step(
            "bench",
            _command(
                "capt_deploy.cli_bench",
                *(str(bundle), "--backend", "gpu", "--json"),
                *("--scope", _SCOPES, "--batch", "1,8,32", "--seconds", "1"),
            ),
            70,
        ),
        Step(
            "open_clip",
            _module(
                "latency",
                *("--device", "cuda", *model, *precisions),
                *("--scopes", _SCOPES, *batches, *quick, "--work", str(work), "--json"),
            ),
            100,
        ),
        *(
            Step(f"train {world}", _module("training", "--device", "cuda", "--world", world), 55)
            for world in worlds
        ),
    ]


def _command(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"from {module} import main; main()", *arguments)


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.{name}", *arguments)


def run_steps(own: Sequence[Step], report: Report, seconds: float) -> None:
    """Run steps one after the other, and none for longer than what is left of all `seconds`."""
    end = time.monotonic() + seconds
    for step in own:
        limit = min(step.seconds, end - time.monotonic())
        say(f"{step.name} (at most {max(0.0, limit):.0f} s)")
        done = run_step(step, limit) if limit > 1 else Done(step.name, "no time left", 0.0)
        report.add(done)
        if done.state != "ok":
            say(f"{step.name}: {done.state}\n{done.said}")


def run_step(step: Step, limit: float) -> Done:
    """Run one; when its time is over it is killed with all that it has started."""
    start = time.monotonic()
    process = subprocess.Popen(
        step.words,
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a group, to be killed as one
    )
    try:
        out, err = process.communicate(timeout=limit)
        state = "ok" if process.returncode == 0 else f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        _kill(process)
        out, err = process.communicate()
        state = f"stopped after {limit:.0f} s"
    except BaseException:  # Ctrl-C, which does not reach the group by itself
        _kill(process)
        raise
    seconds = time.monotonic() - start
    result = None
    if state == "ok" and step.as_json:
        try:
            result = json.loads(out)
        except json.JSONDecodeError as cause:
            state = f"printed no JSON ({cause})"
    said = "" if state == "ok" and step.as_json else f"{out}\n{err}".strip()[-_TAIL:]
    return Done(step.name, state, seconds, result, said)


def _kill(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has just ended
        return


def text_of(done: Sequence[Done]) -> str:
    """Return what came of it: a table of the steps, and one of all latencies."""
    parts = [
        table(
            ("step", "state", "seconds"),
            [(one.name, one.state, f"{one.seconds:.0f}") for one in done],
        )
    ]
    results = {one.name: one.result for one in done if one.result is not None}
    rows = list(results.get("bench", []))
    for cell in results.get("open_clip", {}).values():
        rows += cell["rows"]
    if rows:
        header = ("backend", "precision", "scope", "batch", "p50 ms", "p99 ms", "images/s")
        parts.append(table(header, [_cells(row) for row in rows]))
    for name, result in results.items():
        if name.startswith("train"):
            parts.append(f"{name}: {result['seconds']:.1f} s, harmonic {result['harmonic']:.3f}")
    return "\n\n".join(parts)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    device = row["device"].split(" ")[0]
    return (
        *(f"{row['backend']} {device}", row["precision"], row["scope"], str(row["batch"])),
        *(f"{row['p50_ms']:.3f}", f"{row['p99_ms']:.3f}", f"{row['throughput_per_s']:.1f}"),
    )


if __name__ == "__main__":
    main()
