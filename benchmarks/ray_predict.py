"""Label 20,000 photos with `capt-predict --ray`, killed three times, beside one process.

    python -m benchmarks.exported work --model "demo model"
    python -m benchmarks.ray_predict --name "demo model" --bundle work/demo_model/fp32.capt

The photos are small JPEGs made from a seed. Whole commands are timed, with their start. The killed
job is ended by SIGKILL, with all its processes, at random moments; its rows are then compared with
those of the single process. Cells stay in benchmarks/results/ray_predict.json.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import click
import numpy as np
from PIL import Image

from benchmarks.record import add_cells, load_average, load_cells, write_docs
from capt_deploy.core.console import Command, PathInHome, print_json, say, track
from capt_deploy.core.errors import BackendError
from capt_deploy.core.machine import usable_cores

NAME = "ray_predict"
BACKEND = ("--backend", "onnxruntime-cpu")  # the same for all, so that floats are as well
DOCS = Path(__file__).parents[1] / "docs" / "embedding.md"
_GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "tiny.capt"
_MARK = "CAPT_BENCHMARK_JOB"  # variable by which all processes of a job are known
_SECONDS = 60  # for them to end


def write_photos(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` JPEGs of 64 x 64 pixels, each of other soft colours; every 1,000th is cut off.

    Args:
        folder: of the photos.
        count: of photos.
        seed: of the colours.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in track(range(count), "photos", "photos"):
        colours = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        file = folder / f"{number:06d}.jpg"
        colours.resize((64, 64), Image.Resampling.BICUBIC).save(file, quality=90)
        if number % 1000 == 999:
            os.truncate(file, 100)


class Job:
    """A `capt-predict --ray` in processes of its own."""

    def __init__(self, bundle: Path, photos: Path, out: Path, log: Path) -> None:
        code = "from capt_deploy.cli.predict import main; main()"
        self._mark = f"{_MARK}={uuid4().hex}"
        name, _, value = self._mark.partition("=")
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, bundle, photos, *BACKEND, "--ray", "--out", out],
                env={**os.environ, name: value},
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """Return the ids of all processes of the job that are alive, Ray's included."""
        return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if self._owns(folder)]

    def _owns(self, folder: Path) -> bool:
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            return state != "Z" and self._mark.encode() in (folder / "environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            return False

    def kill(self) -> None:
        """End all processes of the job by SIGKILL, and wait until none is left."""
        deadline = time.monotonic() + _SECONDS
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        while left := self.processes():
            for process in left:
                os.kill(process, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise BackendError(f"processes {left} survive SIGKILL")
            time.sleep(0.05)


def finished_parts(out: Path) -> dict[str, int]:
    """Return the finished parts, with the time at which each was written, in nanoseconds."""
    return {file.name: file.stat().st_mtime_ns for file in out.glob("part-*.parquet")}


def kill_at(job: Job, out: Path, parts: int) -> None:
    """Kill a job as soon as `parts` more are finished than before.

    Raises:
        BackendError: the job ends before.
    """
    enough = len(finished_parts(out)) + parts
    while len(finished_parts(out)) < enough:
        if job.process.poll() is not None:
            raise BackendError(f"the job ended with {job.process.returncode} before it was killed")
        time.sleep(0.002)
    job.kill()


def killed_and_continued(
    start: Callable[[], Job], out: Path, total: int, moments: Sequence[float]
) -> list[int]:
    """Kill a job several times, then let it end; return how many parts each attempt finished.

    Args:
        start: starts or continues the job.
        out: where its rows go.
        total: number of parts of the job.
        moments: of each kill, as shares of the parts that are still missing.

    Raises:
        BackendError: the job ended too early or failed, or a finished part was written again.
    """
    attempts, before = [], dict[str, int]()
    for moment in [*moments, None]:
        job = start()
        if moment is None:
            if (code := job.process.wait()) not in (0, 1):
                raise BackendError(f"the job that was continued ended with {code}")
        else:
            kill_at(job, out, max(1, int(moment * (total - len(before)))))
        after = finished_parts(out)
        if any(after.get(name) != written for name, written in before.items()):
            raise BackendError("a part that was finished has been lost or written again")
        attempts.append(len(after) - len(before))
        before = after
    return attempts


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Return the rows in a folder of results, in the form of `capt-predict --json`."""
    from pyarrow.parquet import read_table

    rows: list[dict[str, Any]] = read_table(out).to_pylist()
    for row in rows:
        for key in [*row] if row["error"] else ["error"]:
            if key not in ("path", "error") or row[key] is None:
                del row[key]
    return rows


def compare(rows: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return how many photos are missing, are there twice, or differ from the single process."""
    found = {row["path"]: row for row in rows}
    return {
        "missing": sum(row["path"] not in found for row in expected),
        "twice": len(rows) - len(found),
        "different": sum(found.get(row["path"]) != row for row in expected),
        "errors": sum("error" in row for row in rows),
    }


@click.command(cls=Command)
@click.option("--bundle", type=PathInHome(), default=_GOLDEN, help="By default a golden file.")
@click.option("--name", default="golden", show_default=True, help="Of the bundle, in the results.")
@click.option("--count", default=20_000, show_default=True, type=click.IntRange(2000))
@click.option("--kills", default=3, show_default=True)
@click.option("--seed", type=int, help="Of the moments of the kills; by default another each time.")
@click.option("--docs", is_flag=True, help="Write the table into docs/embedding.md as well.")
def main(bundle: Path, name: str, count: int, kills: int, seed: int | None, docs: bool) -> None:
    """Measure, compare, and print the figures.

    \b
    Example:
      python -m benchmarks.ray_predict --name "demo model" --bundle demo/pictograms.capt
    """
    seed = random.randrange(2**31) if seed is None else seed
    moments = [random.Random(seed + kill).uniform(0.05, 0.6) for kill in range(kills)]
    load_before = load_average()
    with TemporaryDirectory(prefix="capt-") as folder:
        work = Path(folder)
        photos, log = work / "photos", work / "log"
        write_photos(photos, count)
        single = _single(bundle, photos)
        expected = json.loads(single.pop("stdout"))
        say(json.dumps(single))
        whole = _whole(bundle, photos, work / "whole", log)
        say(json.dumps(whole))
        out = work / "killed"
        attempts = killed_and_continued(
            lambda: Job(bundle, photos, out, log), out, whole["parts"], moments
        )
        cell = {
            "photos": count,
            "cores": usable_cores(),
            "single": single | _rate(count, single["seconds"]),
            "ray": whole
            | _rate(count, whole["seconds"])
            | compare(read_rows(work / "whole"), expected),
            "killed": {"seed": seed, "parts_of_attempts": attempts}
            | compare(read_rows(out), expected),
            "load_before": load_before,
        }
    add_cells(NAME, {name: cell})
    if docs:
        write_docs(DOCS, "ray", markdown(load_cells(NAME)))
    print_json(cell)


def markdown(cells: Mapping[str, Any]) -> str:
    """Return the table of the docs."""
    head = (
        "| model | | seconds | images/s | rows missing | twice | other than the single process's |"
    )
    lines = [head, "|---|---|---|---|---|---|---|"]
    for name, cell in cells.items():
        single, whole, killed = cell["single"], cell["ray"], cell["killed"]
        figures = f"{single['seconds']:.0f} | {single['photos_per_s']:.0f} | | |"
        lines.append(f"| {name} | one process | {figures} |")
        figures = f"{whole['seconds']:.0f} | {whole['photos_per_s']:.0f}"
        lines.append(f"| {name} | `--ray` | {figures} | {_differences(whole)} |")
        lines.append(f"| {name} | `--ray`, killed | | | {_differences(killed)} |")
    return "\n".join(lines)


def _differences(counts: Mapping[str, int]) -> str:
    return " | ".join(str(counts[key]) for key in ("missing", "twice", "different"))


def _rate(count: int, seconds: float) -> dict[str, float]:
    return {"photos_per_s": count / seconds}


def _single(bundle: Path, photos: Path) -> dict[str, Any]:
    code = "from capt_deploy.cli.predict import main; main()"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, bundle, photos, *BACKEND, "--json"],
        capture_output=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise BackendError(f"the single process failed: {done.stderr.decode()}")
    return {"seconds": time.perf_counter() - start, "stdout": done.stdout}


def _whole(bundle: Path, photos: Path, out: Path, log: Path) -> dict[str, Any]:
    start = time.perf_counter()
    job, first = Job(bundle, photos, out, log), None
    while job.process.poll() is None:
        if first is None and finished_parts(out):
            first = time.perf_counter() - start
        time.sleep(0.01)
    if job.process.returncode not in (0, 1):
        raise BackendError(f"the job failed: {log.read_text()}")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "first_part_seconds": first, "parts": len(finished_parts(out))}


if __name__ == "__main__":
    main()
