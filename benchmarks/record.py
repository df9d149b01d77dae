"""Write benchmark figures to `results` and the docs, with the conditions of the measurement."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from capt_deploy.core.errors import DataError
from capt_deploy.core.files import read_json, write_bytes, write_json
from capt_deploy.core.machine import installed

_ROOT = Path(__file__).parents[1]
RESULTS = _ROOT / "benchmarks" / "results"
_MEASURED = ("capt_deploy", "capt_train", "export", "benchmarks/*.py", "examples")
QUIET = 0.5  # load above which other programs disturb the times
_VERSIONED = ("torch", "open_clip_torch", "onnxruntime-gpu", "onnxruntime", "numpy", "pillow")


def describe() -> dict[str, Any]:
    """Return commit, versions and machine."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *_MEASURED)),
        "python": platform.python_version(),
        "machine": {"arch": platform.machine(), "cores": os.cpu_count(), "gpu": _gpu()},
        "versions": installed(_VERSIONED),
    }


def load_average() -> float | None:
    """Return the system load, averaged over the last minute; None where it is unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write `results/NAME.json`."""
    path = RESULTS / f"{name}.json"
    write_json(path, result)
    return path


def load_cells(name: str) -> dict[str, dict[str, Any]]:
    """Return the cells that `results/NAME.json` holds, by key."""
    path = RESULTS / f"{name}.json"
    cells: dict[str, dict[str, Any]] = read_json(path, DataError)["cells"] if path.exists() else {}
    return cells


def add_cells(name: str, cells: Mapping[str, Mapping[str, Any]]) -> None:
    """Put cells, one a line, into `results/NAME.json`; other processes may add theirs.

    Each keeps the commit that it was measured at; versions and machine are those of the last.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    measured = describe()
    stamped = {key: {**cell, "commit": measured["commit"][:12]} for key, cell in cells.items()}
    with FileLock(RESULTS / f".{name}.lock"):
        lines = [
            f"  {json.dumps(key)}: {json.dumps(_rounded(cell), ensure_ascii=False)}"
            for key, cell in {**load_cells(name), **stamped}.items()
        ]
        text = f' "measured": {json.dumps(measured)},\n "cells": {{\n' + ",\n".join(lines)
        write_bytes(RESULTS / f"{name}.json", f"{{\n{text}\n }}\n}}\n".encode())


def _rounded(value: Any) -> Any:
    """Return JSON whose floats have eight significant digits."""
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def write_docs(path: Path, mark: str, text: str) -> None:
    """Put `text` between `<!-- MARK -->` and `<!-- end of MARK -->`."""
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, _, rest = path.read_text().partition(start)
    _, _, after = rest.partition(end)
    write_bytes(path, f"{before}{start}\n{text}\n{end}{after}".encode())


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
