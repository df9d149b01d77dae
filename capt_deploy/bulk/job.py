"""Label many photos on Ray, so that a killed job can be continued."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from capt_deploy.backends.options import RuntimeOptions
from capt_deploy.backends.spec import AUTO, find_backends
from capt_deploy.bulk.labeller import Labeller, LabelOptions
from capt_deploy.bulk.parts import Part, fingerprint
from capt_deploy.bulk.pool import LOCAL, Engines, choose_engines, connected, label_parts, machines
from capt_deploy.bulk.results import Results
from capt_deploy.bulk.storage import is_uri
from capt_deploy.bundle.read import MANIFEST, Bundle, open_bundle
from capt_deploy.core.console import Progress, counted, progress, say, warn
from capt_deploy.core.errors import BackendError, DataError
from capt_deploy.core.files import expand_home
from capt_deploy.serving.opening import open_backend
from capt_deploy.serving.predictor import Predictor


class Summary(NamedTuple):
    """How many photos have their rows, and how many of these hold an error."""

    images: int
    errors: int


def label_on_ray(
    path: Path, parts: Sequence[Part], out: str, options: LabelOptions, address: str = LOCAL
) -> Summary:
    """Write a row for every photo to Parquet files in `out`, and return the counts.

    Parts that are there from an earlier call with the same bundle, photos and options are left as
    they are: a call after a crash does the rest.

    Args:
        path: of the bundle; a cluster gets a copy of it.
        parts: of the photos; a cluster must reach them by their names.
        out: a folder or URI, new or to be continued; a cluster must reach it.
        options: what is asked of each photo.
        address: "local", or the address of a cluster as `ray.init` takes it.

    Raises:
        ConfigError: `out` holds something else, or what another bundle, list of photos or other
            options have led to; or another command is writing to it; or the options cannot be
            promised.
        BundleError: the bundle is damaged or cannot promise what the options ask.
        BackendError: the backend cannot run, Ray cannot be reached, or a worker died repeatedly.
        DataError: a table of photos cannot be read any more, or a result is damaged.
    """
    specs = find_backends(options.backend)
    bundle = open_bundle(path)
    Predictor(bundle, options.decisions)  # whether it can promise that
    if not bundle.manifest.verified:  # which the workers would say to nobody
        warn(f"{path}: was exported although its check had failed")
    if address == LOCAL and options.backend == AUTO:
        # Once, so that all engines, also those of a later start, run the same. On a CPU each has
        # one core.
        opened = open_backend(bundle, AUTO, None, RuntimeOptions(threads=1))
        opened.backend.close()
        spec, precision = opened.candidate
        specs, options = (spec,), replace(options, backend=spec.name, precision=precision)
    results = Results(out if is_uri(out) else str(expand_home(out).absolute()))
    photos = sum(part.photos for part in parts)
    done = results.begin(_describe(bundle, parts, photos, options), len(parts))
    try:
        missing = [part for part in parts if part.number not in done]
        if missing:
            with connected(address), progress("predicting", photos, "images") as counter:
                nodes = machines()
                engines = choose_engines(specs, nodes)
                content = None if address == LOCAL and len(nodes) == 1 else _content(bundle)
                folder = bundle.path.absolute()
                labeller = Labeller(folder, options, results, engines.cores, content)
                counter.advance(photos - sum(part.photos for part in missing))
                _run(missing, labeller, engines, counter)
    finally:
        results.end()
    rows, errors = results.count(len(parts))
    if rows != photos:
        raise DataError(f"{out}: expected {photos} rows, came {rows}; its files were changed")
    return Summary(rows, errors)


def _run(missing: Sequence[Part], labeller: Labeller, engines: Engines, counter: Progress) -> None:
    """Label the parts; raises BackendError where some could not be."""
    waiting = {part.number: part for part in missing}
    lost, said = [], False
    for outcome in label_parts(missing, labeller, engines):
        part = waiting.pop(outcome.part)
        if outcome.error:
            raise BackendError(f"{outcome.error}; the same command continues")
        if outcome.lost:
            lost.append(part)
            continue
        if not said:
            say(f"{counted(engines.number, 'engine')}: {outcome.running_on}")
            said = True
        counter.advance(part.photos)
    if lost:
        first = min(lost, key=lambda part: part.number)
        raise BackendError(
            f"{counted(len(lost), 'part')} of at most {first.photos} images killed each worker, "
            f"the first begins with {first.begin}; memory may be short, or a photo break its "
            f"decoder; all others are done, and the same command tries these again"
        )


def _describe(
    bundle: Bundle, parts: Sequence[Part], photos: int, options: LabelOptions
) -> dict[str, object]:
    """Return the job as JSON: bundle, photos and options, without the batch size.

    Rows of other batch sizes differ in rounding alone.
    """
    settings = asdict(options)
    del settings["batch_size"]
    listed = {"count": photos, "parts": len(parts), "sha256": fingerprint(parts)}
    return {"format": 1, "bundle": {"sha256": _bundle_hash(bundle)}, "photos": listed, **settings}


def _bundle_hash(bundle: Bundle) -> str:
    """Return a hash of the content, for a folder and a zip of it the same."""
    if bundle.lone_graph is not None:
        return hashlib.sha256(bundle.lone_graph.onnx).hexdigest()
    # The manifest holds the hashes of all other files.
    text = json.dumps(bundle.manifest.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _content(bundle: Bundle) -> dict[str, bytes]:
    """Return the files of a bundle by their names in it; "" for a zip or a lone graph.

    Who loads them compares them with their hashes.
    """
    if not bundle.path.is_dir():
        return {"": bundle.path.read_bytes()}
    names = (MANIFEST, *bundle.manifest.files)
    return {name: (bundle.path / name).read_bytes() for name in names}
