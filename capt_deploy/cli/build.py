"""`capt-build`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from capt_deploy.backends.batch_sizes import BATCHES, check_batches
from capt_deploy.core.console import Command, PathInHome, print_json, say
from capt_deploy.core.errors import BackendError
from capt_deploy.core.version import __version__

if TYPE_CHECKING:
    from capt_deploy.backends.tensorrt.cache import EngineCache, Entry
    from capt_deploy.backends.tensorrt.store import Target
    from capt_deploy.bundle.graphs import StoredGraph

_LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def _batches(context: Any, option: Any, text: str) -> tuple[int, int, int]:
    """Return three rising sizes, as in `1,8,32`; a single one stands for all three."""
    try:
        sizes = [int(part) for part in text.split(",")]
        smallest, usual, largest = sizes * 3 if len(sizes) == 1 else sizes
        check_batches((smallest, usual, largest))
    except (ValueError, BackendError) as cause:
        reason = "expected smallest ≤ usual ≤ largest from 1 on, such as 1,8,32"
        raise click.BadParameter(f"{text!r}: {reason}") from cause
    return smallest, usual, largest


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=PathInHome(), required=False)
@click.option("--backend", type=click.Choice(list(_LIBRARIES)), help="Whose engine to build.")
@click.option(
    "--sm",
    type=click.IntRange(1),
    help="Compute capability of another machine's GPU, 89 for 8.9; tensorrt-rtx alone, and then "
    "no GPU is needed here.",
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
@click.option("--precision", help="Which graph; by default the one that suits the backend.")
@click.option("--cache", type=PathInHome(), help="Folder of the engines.  [default: the user's]")
@click.option(
    "--list", "as_list", is_flag=True, help="List what the cache holds, and build nothing."
)
@click.option(
    "--prune",
    is_flag=True,
    help="Remove damaged entries and the least recently used ones above $CAPT_ENGINE_CACHE_GB "
    "(default 10; 0 removes all), and build nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@click.version_option(__version__, prog_name="capt")
def main(
    bundle: Path | None,
    backend: str | None,
    sm: int | None,
    device: int,
    batches: tuple[int, int, int],
    precision: str | None,
    cache: Path | None,
    as_list: bool,
    prune: bool,
    as_json: bool,
) -> None:
    """Build the engine of a BUNDLE ahead of time, or look after the cache of engines.

    BUNDLE may also be a lone model.onnx. The engine lies in the cache, where Classifier.load finds
    it. One for another machine can be carried there: copy the file that is printed into the cache
    folder of that machine.

    \b
    Example:
      capt-build pets.capt --backend tensorrt
      capt-build pets.capt --backend tensorrt-rtx --sm 89 --batch 1,1,1 --cache engines
      capt-build --list
    """
    from capt_deploy.backends.tensorrt.cache import EngineCache

    store = EngineCache(cache)
    if as_list or prune:
        if bundle is not None:
            raise click.UsageError("--list and --prune are about the cache: leave BUNDLE out")
        _look_after(store, prune, as_list, as_json)
        return
    if bundle is None or backend is None:
        raise click.UsageError("expected BUNDLE and --backend, or --list, or --prune")
    graph = _open(bundle, backend, precision)
    result = _build(store, graph, _LIBRARIES[backend], sm, device, batches)
    if as_json:
        print_json(result)
    else:
        did = "was there already" if result["cached"] else f"built in {result['seconds']:.1f} s"
        click.echo(
            f"{result['path']}: {result['bytes'] / 1e6:.1f} MB for SM {result['key']['sm']}, {did}"
        )


def _look_after(store: "EngineCache", prune: bool, as_list: bool, as_json: bool) -> None:
    result: dict[str, Any] = {"folder": str(store.folder)}
    if prune:
        pruned = store.prune()
        result["removed"] = {"entries": pruned.entries, "bytes": pruned.bytes}
        say(f"{store.folder}: removed {pruned.entries} entries, {pruned.bytes / 1e6:.1f} MB")
    if as_list or as_json:
        result["entries"] = [_describe(entry) for entry in store.entries()]
    if as_json:
        print_json(result)
    elif as_list:
        _print_table(store, result["entries"])


def _describe(entry: "Entry") -> dict[str, Any]:
    return {
        "path": str(entry.path),
        "bytes": entry.bytes,
        "used": entry.used,
        "damaged": entry.key is None,
        "key": entry.key,
    }


def _print_table(store: "EngineCache", rows: list[dict[str, Any]]) -> None:
    from datetime import datetime

    from capt_deploy.core.console import table

    header = ("entry", "kind", "library", "SM", "GPU", "precision", "batches", "MB", "last used")
    names = ("kind", "library", "sm", "gpu", "precision", "batches")
    lines = []
    for row in rows:
        key = row["key"] or {"kind": "damaged"}
        version = f" {key['version']}" if "version" in key else ""
        cells = {name: str(key.get(name) or "") for name in names}
        cells["library"] += version
        used = datetime.fromtimestamp(row["used"]).strftime("%Y-%m-%d %H:%M")
        lines.append((Path(row["path"]).stem, *cells.values(), f"{row['bytes'] / 1e6:.1f}", used))
    click.echo(table(header, lines) if lines else f"{store.folder}: holds no engine")


def _open(path: Path, backend: str, precision: str | None) -> "StoredGraph":
    """Return a graph of a bundle, or a lone graph, as `Classifier.load` does."""
    from capt_deploy.backends import preferred_precision
    from capt_deploy.bundle.read import open_bundle

    bundle = open_bundle(path)
    return bundle.graph(precision or preferred_precision(backend, bundle.precisions))


def _build(
    store: "EngineCache",
    graph: "StoredGraph",
    library: str,
    sm: int | None,
    device: int,
    batches: tuple[int, int, int],
) -> dict[str, Any]:
    """Obtain the engine; raises like `engine_store.obtain`."""
    import time

    from capt_deploy.backends.tensorrt.store import key_of, obtain

    start = time.perf_counter()
    target = _target(library, sm, device)
    key = key_of(graph, library, target, batches)
    path = store.path_of(key)
    engine = store.read(key)
    cached = engine is not None
    if engine is None:
        engine = obtain(store, key, graph, target, lambda data: data)
        if not path.exists():
            raise BackendError(f"{path}: the engine was built but could not be kept")
    return {
        "path": str(path),
        "bytes": len(engine),
        "seconds": time.perf_counter() - start,
        "cached": cached,
        "key": key.to_json(),
    }


def _target(library: str, sm: int | None, device: int) -> "Target":
    """Return the GPU to build for: one named by its SM, else one of this machine.

    Raises:
        BackendError: the library builds for its own GPU alone.
        UnavailableError: there is no GPU here, or no library.
    """
    from capt_deploy.backends.tensorrt.device import open_device
    from capt_deploy.backends.tensorrt.engine import load_library
    from capt_deploy.backends.tensorrt.store import Target
    from capt_deploy.core.errors import UnavailableError

    load_library(library)
    if sm is not None:
        if library == "tensorrt":
            raise BackendError("tensorrt builds for the GPU it runs on; leave --sm out")
        return Target(sm)
    try:
        gpu = open_device(device)
    except UnavailableError as cause:
        if library == "tensorrt":
            raise
        raise UnavailableError(f"{cause}; or name another machine's GPU with --sm") from cause
    return Target(gpu.sm, gpu.name, gpu.driver, gpu.active)
