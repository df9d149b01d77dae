"""Read a bundle: a `*.capt` folder, a zip of one, or a lone `model.onnx`."""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.bundle.graphs import (
    Shape,
    StoredGraph,
    has_changed,
    read_metadata,
    read_shapes,
)
from capt_deploy.bundle.manifest import PRECISION_KEY, FileRecord, Manifest
from capt_deploy.confidence.calibration import DISTANCE_AWARE, Calibration
from capt_deploy.confidence.decisions import Decisions
from capt_deploy.core.errors import BundleError
from capt_deploy.core.files import (
    LFS_START,
    TooLargeError,
    expand_home,
    is_inside,
    open_file,
    read_file,
)

MANIFEST = "manifest.json"
TEXT_EMBEDDINGS = "text_embeddings.safetensors"
REPORT = "report.json"
REFERENCE = "reference.safetensors"
CALIBRATION = "calibration.safetensors"

_MANIFEST_LIMIT = 64 * 2**20  # bytes; a zip of nothing but zeros must not fill the memory
_FILE_LIMIT = 2**31 - 1  # bytes of a file that is held in memory; see docs/FORMAT.md
_BLOCK = 2**22  # bytes copied at once
_NO_ARRAY = np.empty(0)
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Each file is checked against the hash in the manifest when it is read."""

    path: Path
    manifest: Manifest
    lone_graph: StoredGraph | None = None  # of a `model.onnx` without its bundle

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            BundleError: the manifest does not list the file, or it is missing or changed.
        """
        if self.lone_graph is not None:
            raise BundleError(f"{self.path}: a lone graph has no {name}; load the whole bundle")
        record = self._record(name)
        data = _read_member(self.path, name, min(record.bytes, _FILE_LIMIT))
        if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
            pointer = data.startswith(LFS_START)
            way_out = "fetch its content with `git lfs pull`" if pointer else "export it again"
            raise BundleError(
                f"{self.path}: {name} is not the file that was exported ({len(data)} bytes, "
                f"expected {record.bytes} with SHA-256 {record.sha256[:12]}…); {way_out}"
            )
        return data

    def _record(self, name: str) -> FileRecord:
        record = self.manifest.files.get(name)
        if record is None:
            listed = ", ".join(sorted(self.manifest.files))
            raise BundleError(f"{self.path}: the manifest lists no {name!r}, only {listed}")
        return record

    @property
    def precisions(self) -> tuple[str, ...]:
        """Return the precisions of the graphs in the bundle's order."""
        lone = self.lone_graph
        return tuple(self.manifest.graphs) if lone is None else (lone.precision,)

    def graph(self, precision: str) -> StoredGraph:
        """Return the graph of one precision.

        Raises:
            BundleError: there is none, or the graph, its weights or the manifest were changed.
        """
        if precision not in self.precisions:
            holds = ", ".join(self.precisions)
            raise BundleError(f"{self.path}: no {precision!r} graph; it holds {holds}")
        if self.lone_graph is not None:
            return self.lone_graph
        record = self.manifest.graphs[precision]
        onnx = self.read(record.file)
        # The hashes do not cover the manifest, and other class names would mislabel every image.
        inside = Manifest.from_json(read_metadata(onnx) or "", f"{self.path}, inside the graph")
        if replace(self.manifest, files={}) != inside:
            raise BundleError(
                f"{self.path}: its manifest was changed after the export; export it again"
            )
        self.check_fit(onnx)
        if record.weights is None:
            return StoredGraph(onnx, precision)
        folder = self.private_copy(record.weights)
        return StoredGraph(onnx, precision, Path(folder.name), folder)

    def check_fit(self, onnx: bytes) -> None:
        """Raise BundleError where a graph or the text side does not fit the manifest."""
        manifest, dim = self.manifest, None
        if (text := manifest.open_vocabulary) is not None and self.lone_graph is None:
            dim = self.text_embeddings()["text_embeddings"].shape[1]  # of the classes to be added
            for name in (text.file, text.tokenizer, text.weights or text.file):
                self._record(name)
        classes = len(manifest.class_names)
        expected: dict[str, Shape] = {
            "images": (None, *manifest.preprocess.size, 3),
            "logits": (None, classes),
            "probabilities": (None, classes),
            "embedding": (None, dim),
        }
        for name, shape in read_shapes(onnx).items():
            if name in expected and not _fits(shape, expected[name]):
                raise BundleError(
                    f"{self.path}: the graph's {name} have the shape {_in_words(shape)}, expected "
                    f"{_in_words(expected[name])} by its manifest; export it again"
                )

    def private_copy(self, name: str) -> "TemporaryDirectory[str]":
        """Return a folder with a copy of a file, for files too large to be held in memory.

        Libraries read such files by their path, when somebody may have changed them since they were
        hashed. Nobody else can access the folder; it is removed with the object that is returned.

        Raises:
            BundleError: as `copy`.
        """
        folder = TemporaryDirectory(prefix="capt-", ignore_cleanup_errors=True)
        target = Path(folder.name, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy(name, target)
        return folder

    def copy(self, name: str, target: Path) -> None:
        """Copy a file without loading it into memory; it is read once, and hashed meanwhile.

        Raises:
            BundleError: the file is missing or changed, the bundle is a zip, or the copy cannot be
                written. What was written until then is not to be used.
        """
        record = self._record(name)
        if not self.path.is_dir():
            raise BundleError(f"{self.path}: too large to run from a zip; unpack it first")
        digest = hashlib.sha256()
        try:
            with open_file(self.path / name) as file, target.open("wb") as copy:
                changed = os.fstat(file.fileno()).st_size != record.bytes
                while not changed and (block := file.read(_BLOCK)):
                    digest.update(block)
                    copy.write(block)
        except OSError as cause:
            raise BundleError(
                f"{self.path}: {name} cannot be copied to {target} ({cause}); $TMPDIR may name a "
                f"disk with more space"
            ) from cause
        if changed or digest.hexdigest() != record.sha256:
            raise BundleError(f"{self.path}: {name} was changed after the export; export it again")

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """Return the arrays of a safetensors file; docs/FORMAT.md lists them.

        Raises:
            BundleError: as `read`, or the file is damaged.
        """
        from safetensors.numpy import load

        data = self.read(name)
        try:
            return dict(load(data))
        except Exception as cause:  # types that numpy lacks raise others than SafetensorError
            raise BundleError(f"{self.path}: {name} is damaged ({cause!r})") from cause

    def text_embeddings(self) -> dict[str, NDArray[np.float32]]:
        """Return the class rows `text_embeddings` (classes, dim), `bias` (classes,), and others.

        They have the temperature of the first graph. `zero_shot` (classes, dim) are the rows of
        the hand-written prompt, if the graph's embeddings are those of the frozen model. With
        distance-aware calibration there are also `factors` (classes,), and for classes to be added
        `tuned_rows` and `tuned_hand_written` (tuned, dim).

        Raises:
            BundleError: the file is damaged, or its arrays are not those of docs/FORMAT.md.
        """
        arrays = self.arrays(TEXT_EMBEDDINGS)
        classes = len(self.manifest.class_names)
        dim = arrays["text_embeddings"].shape[-1:] if "text_embeddings" in arrays else ()
        tuned = arrays["tuned_rows"].shape[:1] if "tuned_rows" in arrays else ()
        shapes = {
            "text_embeddings": (classes, *dim),
            "bias": (classes,),
            "zero_shot": (classes, *dim),
            "tuned_rows": (*tuned, *dim),
            "tuned_hand_written": (*tuned, *dim),
        }
        for name, shape in shapes.items():
            array = arrays.get(name, _NO_ARRAY)
            fits = array.dtype == np.float32 and array.shape == shape and np.isfinite(array).all()
            if not fits and (name in arrays or name in ("text_embeddings", "bias")):
                raise BundleError(
                    f"{self.path}, {TEXT_EMBEDDINGS}: expected {name} as finite float32 of shape "
                    f"{shape}, came {array.dtype} {array.shape}; export it again"
                )
        return arrays

    def decisions(self) -> Decisions | None:
        """Return the scores of the validation images; None in a bundle without them.

        Raises:
            BundleError: the file is damaged, or does not fit the bundle's classes.
        """
        if CALIBRATION not in self.manifest.files:
            return None
        arrays = self.arrays(CALIBRATION)
        try:
            return Decisions.from_arrays(arrays, len(self.manifest.class_names))
        except BundleError as cause:
            raise BundleError(f"{self.path}, {CALIBRATION}: {cause}; export it again") from cause

    def calibration_of(self, precision: str) -> Calibration:
        """Return the calibration inside one graph.

        Raises:
            BundleError: it is distance-aware, and there is no factor above 0 for each class.
        """
        calibration = self.manifest.calibration_of(precision)
        if DISTANCE_AWARE not in self.manifest.calibration[precision]:
            return calibration
        factors = self.text_embeddings().get("factors", np.empty(0, np.float32))
        if (
            factors.shape != (len(self.manifest.class_names),)
            or not ((factors > 0) & (factors < np.inf)).all()
        ):
            raise BundleError(
                f"{self.path}: expected in {TEXT_EMBEDDINGS} a factor above 0 for each of its "
                f"classes, for its calibration is distance-aware; export it again"
            )
        return replace(calibration, factors=tuple(factors.tolist()))


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle folder, a zip of one, or a lone graph. Files are checked when they are read.

    Raises:
        BundleError: it is no bundle, has another schema version, or names files outside itself.
    """
    path = expand_home(path)
    try:
        if path.suffix == ".onnx" and not path.is_dir():
            return _open_lone_graph(path)
        found = path.exists()
    except (OSError, ValueError) as cause:
        raise BundleError(f"{path}: cannot be read ({cause})") from cause
    if not found:
        raise BundleError(f"{path}: no such bundle; expected a folder or zip from capt-export")
    content = _read_member(path, MANIFEST, _MANIFEST_LIMIT)
    manifest = Manifest.from_json(content, f"{path}/{MANIFEST}")
    for name in manifest.linked_files:
        if not is_inside(name):
            raise BundleError(f"{path}: {name!r} leads out of the bundle; do not trust it")
    return Bundle(path, manifest)


def _open_lone_graph(path: Path) -> Bundle:
    onnx = read_file(path, _FILE_LIMIT)
    text = read_metadata(onnx)
    if text is None:
        raise BundleError(f"{path}: carries no manifest; expected a graph from capt-export")
    if has_changed(onnx):
        raise BundleError(f"{path}: is not the graph that was exported; export it again")
    manifest = Manifest.from_json(text, str(path))
    precision = read_metadata(onnx, PRECISION_KEY) or next(iter(manifest.graphs))
    if precision not in manifest.graphs:
        raise BundleError(f"{path}: its manifest knows no {precision} graph; export it again")
    if manifest.graphs[precision].weights:
        raise BundleError(f"{path}: its weights are in a second file; load the whole bundle")
    bundle = Bundle(path, manifest, StoredGraph(onnx, precision))
    bundle.check_fit(onnx)
    return bundle


def is_bundle(path: Path) -> bool:
    """Return whether `path` looks like a bundle folder, a zip, or a lone ONNX file."""
    return (path / MANIFEST).is_file() or (
        path.is_file() and path.suffix in (".onnx", ".zip", ".capt")
    )


def _read_member(path: Path, name: str, limit: int) -> bytes:
    """Return the content of a file of a bundle, whose declared size is checked before.

    Raises:
        BundleError: there is no such file, or it cannot be read or has more than `limit` bytes.
    """
    try:
        if path.is_dir():
            return read_file(path / name, limit)
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            # The files are at the top of the archive or in one folder.
            for member in archive.namelist():
                if member == name or member.split("/", 1)[1:] == [name]:
                    return _unpack(archive, archive.getinfo(member), limit)
    except TooLargeError as cause:
        raise BundleError(
            f"{path}: {name} is not the file that was exported ({cause}); export it again"
        ) from cause
    except Exception as cause:  # zipfile raises a dozen types for damaged archives
        raise BundleError(f"{path}: cannot read {name} ({cause}); is it a bundle?") from cause
    raise BundleError(f"{path}: holds no {name}; is it a bundle?")


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    if member.file_size > limit:
        raise TooLargeError(f"expected at most {limit:,} bytes, came {member.file_size:,}")
    if member.compress_type not in _PACKED:
        raise OSError(f"expected it stored or deflated, came method {member.compress_type}")
    return archive.read(member)


def _fits(shape: Shape, expected: Shape) -> bool:
    return len(shape) == len(expected) and all(
        None in sizes or sizes[0] == sizes[1] for sizes in zip(shape, expected, strict=True)
    )


def _in_words(shape: Sequence[int | None]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"
