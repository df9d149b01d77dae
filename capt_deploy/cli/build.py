"""The command `capt-build`."""

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from capt_deploy.backends.options import BATCHES, PORTABLE, check_batches
from capt_deploy.backends.spec import BACKENDS, BackendSpec, find_backends
from capt_deploy.core.console import Command, PathInHome, counted, print_json, say
from capt_deploy.core.errors import BackendError, ConfigError
from capt_deploy.core.version import __version__

if TYPE_CHECKING:
    from capt_deploy.backends.device import Device
    from capt_deploy.backends.tensorrt.cache import EngineCache, Entry

_BUILDING = [spec.name for spec in BACKENDS if spec.builds_engines]
_PORTABLE = ", ".join(spec.name for spec in BACKENDS if spec.portable_engines)


def _batches(context: Any, option: Any, text: str) -> tuple[int, int, int]:
    """Return three rising sizes, as in `1,8,32`; a single one stands for all three."""
    try:
        sizes = [int(part) for part in text.split(",")]
        smallest, usual, largest = sizes * 3 if len(sizes) == 1 else sizes
        check_batches((smallest, usual, largest))
    except (ValueError, ConfigError) as cause:
        reason = "expected smallest ≤ usual ≤ largest from 1 on, such as 1,8,32"
        raise click.BadParameter(f"{text!r}: {reason}") from cause
    return smallest, usual, largest


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=PathInHome(), required=False)
@click.option("--backend", type=click.Choice(_BUILDING), help="Whose engine to build.")
@click.option(
    "--sm",
    type=click.IntRange(1),
    help=f"Compute capability of another machine's GPU, 89 for 8.9; {_PORTABLE} only, which then "
    "needs no GPU here.",
)
@click.option(
    "--device", default=0, show_default=True, type=click.IntRange(0), help="CUDA's number."
)
@click.option(
    "--batch",
    "batches",
    metavar="SMALLEST,USUAL,LARGEST",
    callback=_batches,
    default=",".join(map(str, BATCHES)),
    show_default=True,
    help="Images at once; Classifier.load needs the same RuntimeOptions(batches=…).",
)
@click.option(
    "--portable",
    type=click.Choice(PORTABLE),
    help="For other machines, at some cost of speed; TensorRT only. hardware: runs on every GPU "
    "from Ampere on, but is neither built nor used on Jetsons. version: later versions of TensorRT "
    "with the same major number run it, on a GPU of the same name.",
)
@click.option("--precision", help="Which graph; by default the one that suits the backend.")
@click.option("--cache", type=PathInHome(), help="Folder of the engines.  [default: the user's]")
@click.option("--list", "as_list", is_flag=True, help="List the cached engines; build nothing.")
@click.option(
    "--prune",
    is_flag=True,
    help="Remove damaged engines and the least recently used ones above $CAPT_ENGINE_CACHE_GB "
    "(default 10; 0 removes all); build nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@click.version_option(__version__, prog_name="capt")
def main(
    bundle: Path | None,
    backend: str | None,
    sm: int | None,
    device: int,
    batches: tuple[int, int, int],
    portable: str | None,
    precision: str | None,
    cache: Path | None,
    as_list: bool,
    prune: bool,
    as_json: bool,
) -> None:
    """Build the engine of a BUNDLE ahead of time, or look after the cache of engines.

    BUNDLE may also be a lone model.onnx. The engine is put in the cache, where Classifier.load
    finds it. To use it on another machine, copy the file that is printed into the cache folder of
    that machine.

    \b
    Example:
      capt-build pets.capt --backend tensorrt
      capt-build pets.capt --backend tensorrt-rtx --sm 89 --batch 1,1,1 --cache engines
      capt-build --list
    """
    from capt_deploy.backends.tensorrt.cache import EngineCache

    engines = EngineCache(cache)
    if as_list or prune:
        if bundle is not None:
            raise click.UsageError("--list and --prune are about the cache: leave BUNDLE out")
        _look_after(engines, prune, as_list, as_json)
        return
    if bundle is None or backend is None:
        raise click.UsageError("expected BUNDLE and --backend, or --list, or --prune")
    (spec,) = find_backends(backend)
    result = _build(engines, bundle, precision, spec, sm, device, batches, portable or "")
    if as_json:
        print_json(result)
    else:
        did = "was there already" if result["cached"] else f"built in {result['seconds']:.1f} s"
        click.echo(
            f"{result['path']}: {result['bytes'] / 1e6:.1f} MB for SM {result['key']['sm']}, {did}"
        )


def _look_after(engines: "EngineCache", prune: bool, as_list: bool, as_json: bool) -> None:
    result: dict[str, Any] = {"folder": str(engines.folder)}
    if prune:
        removed = engines.prune()
        size = sum(entry.bytes for entry in removed)
        result["removed"] = {"entries": len(removed), "bytes": size}
        count = counted(len(removed), "entry", "entries")
        say(f"{engines.folder}: removed {count}, {size / 1e6:.1f} MB")
    entries = engines.entries() if as_list or as_json else []
    if as_json:
        print_json({**result, "entries": [_describe(entry) for entry in entries]})
    elif as_list:
        click.echo(_table(entries) if entries else f"{engines.folder}: holds no engine")


def _describe(entry: "Entry") -> dict[str, Any]:
    return {**asdict(entry), "path": str(entry.path), "damaged": entry.key is None}


def _table(entries: "list[Entry]") -> str:
    from datetime import datetime

    from capt_deploy.core.console import table

    header = ("entry", "kind", "library", "SM", "GPU", "precision", "batches", "MB", "last used")
    rows = []
    for entry in entries:
        key = entry.key or {"kind": "damaged"}
        library = f"{key.get('library', '')} {key.get('version', '')}".strip()
        cells = [str(key.get(name) or "") for name in ("sm", "gpu", "precision", "batches")]
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        size = f"{entry.bytes / 1e6:.1f}"
        kind = ", ".join(filter(None, (str(key.get("kind", "")), key.get("portable"))))
        rows.append((entry.path.stem, kind, library, *cells, size, used))
    return table(header, rows)


def _build(
    engines: "EngineCache",
    bundle: Path,
    precision: str | None,
    spec: BackendSpec,
    sm: int | None,
    device: int,
    batches: tuple[int, int, int],
    portable: str,
) -> dict[str, Any]:
    """Build the engine, unless it is cached; return the JSON that describes it."""
    import time

    from capt_deploy.backends.tensorrt.build import EngineRequest
    from capt_deploy.bundle.read import open_bundle

    opened = open_bundle(bundle)
    if not opened.manifest.verified:
        warnings.warn(f"{bundle}: was exported although its check had failed", stacklevel=2)
    graph = opened.graph(precision or spec.preferred(opened.precisions))
    start = time.perf_counter()
    gpu = _open_gpu(spec, sm, device)
    request = EngineRequest(graph, spec, gpu.sm if gpu else sm or 0, batches, gpu, portable)
    path, engine = engines.path_of(request.key), engines.read(request.key)
    cached = engine is not None
    if engine is None:
        engine = request.obtain(engines, lambda data: data)
        if not path.exists():
            raise BackendError(f"{path}: the engine was built but could not be kept")
    return {
        "path": str(path),
        "bytes": len(engine),
        "seconds": time.perf_counter() - start,
        "cached": cached,
        "key": request.key.to_json(),
    }


def _open_gpu(spec: BackendSpec, sm: int | None, ordinal: int) -> "Device | None":
    """Return the GPU of this machine to build for; None if `sm` is that of another machine."""
    from capt_deploy.backends.device import open_device
    from capt_deploy.backends.tensorrt.engine import load_library
    from capt_deploy.core.errors import UnavailableError

    load_library(spec)
    if sm is not None:
        if not spec.portable_engines:
            raise BackendError(f"{spec.name} builds for the GPU it runs on; leave --sm out")
        return None
    try:
        return open_device(ordinal)
    except UnavailableError as cause:
        if not spec.portable_engines:
            raise
        raise UnavailableError(f"{cause}; or name another machine's GPU with --sm") from cause
