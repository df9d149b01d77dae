"""Measure the cells that are missing, in parallel, and keep each as one line of JSON."""

import json
import logging
import multiprocessing
import os
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from capt_deploy.core.console import counted, progress, say, warn
from capt_deploy.core.errors import CaptError, RunError
from capt_deploy.core.files import naming, write_bytes
from capt_train.compare.plan import Cell, Plan

CELLS = "cells.jsonl"
Lines = dict[str, dict[str, Any]]


def read_cells(folder: Path, plan: Plan) -> Lines:
    """Return the cells of the plan that are measured, by key; those of other settings are left out.

    Raises:
        RunError: a line is no JSON object.
    """
    fingerprints = {cell.key: cell.fingerprint for cell in plan.cells}
    known: Lines = {}
    path = folder / CELLS
    for number, line in enumerate(_lines(path), start=1):
        try:
            values = json.loads(line)
            key, settings, calibrations = (values[name] for name in ("key", "settings", "ece"))
        except (ValueError, RecursionError, KeyError, TypeError) as cause:
            raise RunError(
                f"{path}, line {number}: not as capt-compare writes it; remove it"
            ) from cause
        if fingerprints.get(key) == settings and {*plan.calibrations} <= {*calibrations}:
            known[key] = values
    return known


def run_cells(folder: Path, plan: Plan) -> dict[str, str]:
    """Measure what is missing and append it to `cells.jsonl`; return why cells failed, by key.

    A killed run loses the cells that it was measuring, and no other. One cell that fails does not
    end the others; the next start tries it again.

    Raises:
        RunError: another process writes into the folder, or the file cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{CELLS}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as cause:
        raise RunError(f"{folder}: another capt-compare is writing there") from cause
    try:
        known = read_cells(folder, plan)
        missing = [cell for cell in plan.cells if cell.key not in known]
        say(f"{counted(len(known), 'cell')} measured, {len(missing)} to go")
        failed: dict[str, str] = {}
        if not missing:
            return failed
        with progress("comparing", len(missing), "cells") as counter:
            for cell, outcome in _measured(missing, plan):
                if isinstance(outcome, str):
                    failed[cell.key] = outcome
                    warn(f"WARNING: {cell.key}: {outcome}")
                else:
                    _append(folder / CELLS, _line(cell, outcome))
                counter.advance(1, cell.key)
        return failed
    finally:
        lock.release()


def _line(cell: Cell, figures: dict[str, Any]) -> dict[str, Any]:
    config = cell.config
    return {
        "key": cell.key,
        "data": cell.data,
        "row": cell.row,
        "method": cell.method,
        "variant": cell.variant,
        "shots": config.shots,
        "seed": config.seed,
        "settings": cell.fingerprint,
        **_rounded(figures),
    }


def _measured(cells: list[Cell], plan: Plan) -> Iterator[tuple[Cell, dict[str, Any] | str]]:
    """Yield each cell with its figures, or with the reason why there are none."""
    if plan.processes == 1:
        _begin_worker(None, plan.devices[0])
        for cell in cells:
            yield cell, _measure_one(cell, plan.calibrations)
        return
    remaining = cells
    while remaining:
        done = []
        for cell, outcome in _in_processes(remaining, plan):
            done.append(cell)
            yield cell, outcome
        # a process that was killed takes its pool along; the cells behind it need another one
        remaining = [cell for cell in remaining if cell not in done]


def _in_processes(cells: list[Cell], plan: Plan) -> Iterator[tuple[Cell, dict[str, Any] | str]]:
    """Yield cells as they end; where a process was killed, the cells that were being measured."""
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for place in range(plan.processes):
        devices.put(plan.devices[place % len(plan.devices)])
    threads = max(1, (os.cpu_count() or 1) // plan.processes)
    pool = ProcessPoolExecutor(
        plan.processes, context, initializer=_take_device, initargs=(threads, devices)
    )
    try:
        jobs = {pool.submit(_measure_one, cell, plan.calibrations): cell for cell in cells}
        for job in as_completed(jobs):
            try:
                yield jobs[job], job.result()
            except BrokenProcessPool:
                lost = [cell for other, cell in jobs.items() if not other.done() or _broke(other)]
                for cell in lost[: plan.processes]:
                    yield cell, "its process was killed; perhaps there is too little memory"
                return
    finally:
        pool.shutdown(cancel_futures=True)


def _broke(job: Future[Any]) -> bool:
    return isinstance(job.exception(), BrokenProcessPool)


_device = "auto"  # of this process


def _take_device(threads: int, devices: Any) -> None:
    _begin_worker(threads, devices.get())
    logging.getLogger("capt").setLevel(logging.ERROR)


def _begin_worker(threads: int | None, device: str) -> None:
    """Set the number of threads, None for the usual one, and the device of this process."""
    global _device  # noqa: PLW0603 - a process pool hands nothing else to its tasks
    _device = device
    if threads is None:
        return
    # before the libraries are loaded; more threads than cores make all of them slow
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ[f"{library}_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _measure_one(cell: Cell, calibrations: tuple[str, ...]) -> dict[str, Any] | str:
    from capt_train.compare.measure import measure

    config = cell.config.with_settings({"device": _device})
    try:
        return measure(replace(cell, config=config), calibrations)
    except CaptError as error:
        return str(error)
    except Exception as error:  # a fault in one method must not end the others
        return f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"


def _append(path: Path, values: dict[str, Any]) -> None:
    """Append a line and wait until it is on the disk."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> list[str]:
    """Return the whole lines; a kill may have left a part of one at the end."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole, _, rest = text.rpartition("\n")
    if rest:
        write_bytes(path, (f"{whole}\n" if whole else "").encode())
    return whole.splitlines()


def _rounded(value: Any) -> Any:
    """Return JSON whose floats have six digits behind the point."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
