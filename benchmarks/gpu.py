"""Run the steps of benchmarks/gpu.sh, each in its own process with its own time limit.

A step that fails is reported and does not stop the others. The result is written after every step.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import click

from benchmarks.gpu_steps import Step, chosen, steps
from benchmarks.record import RESULTS, describe
from capt_deploy.backends.spec import BACKENDS, library_packages
from capt_deploy.core.console import Command, say, table
from capt_deploy.core.files import write_json
from capt_deploy.core.gpus import find_driver
from capt_deploy.core.machine import describe_machine, versions

_ROOT = Path(__file__).parents[1]
_SHARED = _ROOT.parent / "shared" / "data" / "cifar100"
ALL_SECONDS = 475.0  # of 8 minutes
_TAIL = 2000  # characters kept of a step's output


@dataclass(frozen=True)
class Done:
    """The outcome of a step."""

    name: str
    state: str  # "ok", "exit code 1", "stopped after 60 s", "no time left", "needs torch"
    seconds: float
    result: Any = None  # its JSON
    output: str = ""  # its end, where the step failed or prints no JSON


@dataclass
class Report:
    """The JSON file with the outcomes, written after each step."""

    path: Path
    about: Mapping[str, Any]
    steps: list[Done] = field(default_factory=list)

    def add(self, done: Done) -> None:
        """Add a step and write the file."""
        self.steps.append(done)
        write_json(self.path, {**self.about, "steps": [asdict(step) for step in self.steps]})


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
    with TemporaryDirectory() as work:
        building = [spec for spec in BACKENDS if spec.builds_engines]
        engines = [spec for spec in building if find_spec(spec.module) is not None]
        known = steps(Path(work), photos=_SHARED.is_dir(), engines=engines)
        _run(chosen(known, only or ""), out)


def _run(selected: Sequence[Step], out: Path) -> None:
    driver = find_driver()
    if driver.problem is not None:
        say(f"not run on a GPU: {driver.problem}")
        sys.exit(2)
    report = Report(
        out,
        {
            "measured": describe(),
            "versions": versions(library_packages()),
            "machine": describe_machine(),
            "cuda": driver.cuda,
        },
    )
    run_steps(selected, report, ALL_SECONDS)
    click.echo(text_of(report.steps))
    say(f"wrote {out}")
    if any(step.state != "ok" for step in report.steps):
        sys.exit(1)


def run_steps(selected: Sequence[Step], report: Report, seconds: float) -> None:
    """Run steps one after the other, all within `seconds`."""
    end, succeeded = time.monotonic() + seconds, set()
    for step in selected:
        if missing := _missing(step):
            say(f"{step.name} will be missing: {missing} is not installed")
    for step in selected:
        limit = min(step.seconds, end - time.monotonic())
        say(f"{step.name} (at most {max(0.0, limit):.0f} s)")
        lacks = _missing(step)
        if not lacks and step.needs and step.needs not in succeeded:
            lacks = step.needs
        problem = f"needs {lacks}" if lacks else "no time left" if limit <= 1 else None
        done = run_step(step, limit) if problem is None else Done(step.name, problem, 0.0)
        report.add(done)
        if done.state == "ok":
            succeeded.add(step.name)
        else:
            say(f"{step.name}: {done.state}\n{done.output}")


def _missing(step: Step) -> str:
    return ", ".join(name for name in step.modules if find_spec(name) is None)


def run_step(step: Step, limit: float) -> Done:
    """Run a step; when its time is over, kill it with all processes that it has started."""
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
    if step.junit is not None and step.junit.exists():
        result = count_tests(step.junit)
        if state == "ok" and not result["passed"]:
            state = "nothing ran"
    output = "" if state == "ok" and step.as_json else f"{out}\n{err}".strip()[-_TAIL:]
    return Done(step.name, state, seconds, result, output)


def count_tests(path: Path) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped, from pytest's XML."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "failures", "errors", "skipped")
    }
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return {"passed": passed, "failed": failed, "skipped": counts["skipped"]}


def _kill(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has just ended
        return


def text_of(done: Sequence[Done]) -> str:
    """Return a table of the steps, and one of all latencies."""
    parts = [
        table(
            ("step", "state", "seconds"),
            [(step.name, step.state, f"{step.seconds:.0f}") for step in done],
        )
    ]
    results = {step.name: step.result for step in done if step.result is not None}
    rows = list(results.get("bench", []))
    for cell in results.get("open_clip", {}).values():
        rows += cell["rows"]
    if rows:
        header = ("backend", "precision", "scope", "batch", "p50 ms", "p99 ms", "images/s")
        parts.append(table(header, [_cells(row) for row in rows]))
    for name, result in results.items():
        if name.startswith("train"):
            run = result["runs"]["default"]
            parts.append(f"{name}: {run['seconds']:.1f} s, harmonic {run['harmonic']:.3f}")
    return "\n\n".join(parts)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    device = row["device"].split(" ")[0]
    return (
        *(f"{row['backend']} {device}", row["precision"], row["scope"], str(row["batch"])),
        *(f"{row['p50_ms']:.3f}", f"{row['p99_ms']:.3f}", f"{row['throughput_per_s']:.1f}"),
    )


if __name__ == "__main__":
    main()
