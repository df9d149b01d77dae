"""Read a bundle: a `*.capt` folder or a zip of one."""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt_deploy.bundle.manifest import DISTANCE_AWARE, Manifest
from capt_deploy.confidence.decisions import Decisions
from capt_deploy.core.errors import BundleError
from capt_deploy.core.files import expand_home, is_inside, sha256_file

MANIFEST = "manifest.json"
TEXT_EMBEDDINGS = "text_embeddings.safetensors"
REPORT = "report.json"
REFERENCE = "reference.safetensors"
CALIBRATION = "calibration.safetensors"

_LARGEST_MANIFEST = 64 * 2**20  # bytes; a zip of nothing but zeros must not fill the memory
# A damaged zip shows up as any of these.
_UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; each file is checked against the manifest's hash when it is read."""

    path: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """Return the content of one of its files.

        Raises:
            BundleError: the manifest does not list it, it is missing, or it was changed.
        """
        record = self.manifest.files.get(name)
        if record is None:
            listed = ", ".join(sorted(self.manifest.files))
            raise BundleError(f"{self.path}: the manifest lists no {name!r}, only {listed}")
        data = _read_member(self.path, name, record.bytes)
        if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
            raise BundleError(
                f"{self.path}: {name} is not the file that was exported ({len(data)} bytes, "
                f"expected {record.bytes} with SHA-256 {record.sha256[:12]}…); export it again"
            )
        return data

    def graph(self, precision: str | None = None) -> tuple[str, bytes]:
        """Return the precision and the ONNX bytes of a graph; the first one by default."""
        graphs = self.manifest.graphs
        chosen = precision or next(iter(graphs))
        if chosen not in graphs:
            raise BundleError(f"{self.path}: no {chosen!r} graph; it holds {', '.join(graphs)}")
        return chosen, self.read(graphs[chosen].file)

    def weights_folder(self, precision: str) -> Path | None:
        """Return where the weights of a graph lie that are not in its own file, checked.

        Raises:
            BundleError: they are missing or changed, or the bundle is a zip.
        """
        name = self.manifest.graphs[precision].weights
        return None if name is None else self.folder_of(name)

    def folder_of(self, name: str) -> Path:
        """Return the folder of one of its files, for what reads that file by itself.

        Raises:
            BundleError: the file is missing or changed, or the bundle is a zip.
        """
        record = self.manifest.files.get(name)
        if not self.path.is_dir():
            raise BundleError(f"{self.path}: too large to run from a zip; unpack it first")
        try:
            known = record is not None and sha256_file(self.path / name) == record.sha256
        except OSError as cause:
            raise BundleError(f"{self.path}: {name} cannot be read ({cause})") from cause
        if not known:
            raise BundleError(f"{self.path}: {name} was changed after the export; export it again")
        return self.path

    def text_embeddings(self) -> dict[str, NDArray[np.float32]]:
        """Return `text_embeddings` (classes, dim), `bias` (classes,), and maybe `zero_shot` rows.

        The hand-written prompt's rows are there where the graph's embeddings fit them, that is
        where the visual side is the frozen one. With distance-aware calibration there are also
        `factors` (classes,), and in an open bundle the rows that further classes are measured to,
        `tuned_rows` and `tuned_hand_written` (tuned, dim).
        """
        return self._arrays(TEXT_EMBEDDINGS)

    def decisions(self) -> Decisions | None:
        """Return what decides about predictions; None in a bundle without it.

        Raises:
            BundleError: the file is damaged, or is not of these classes.
        """
        if CALIBRATION not in self.manifest.files:
            return None
        arrays = self._arrays(CALIBRATION)
        try:
            return Decisions.from_arrays(arrays, len(self.manifest.class_names))
        except BundleError as cause:
            raise BundleError(f"{self.path}, {CALIBRATION}: {cause}; export it again") from cause

    def _arrays(self, name: str) -> dict[str, NDArray[Any]]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return dict(load(self.read(name)))
        except SafetensorError as cause:
            raise BundleError(f"{self.path}: {name} is damaged ({cause})") from cause

    def factors(self, precision: str) -> NDArray[np.float32] | None:
        """Return those that one of its graphs has for distance-aware calibration, (classes,).

        Raises:
            BundleError: they are not there for each class, or are no factors.
        """
        if DISTANCE_AWARE not in self.manifest.calibration[precision]:
            return None
        found = self.text_embeddings().get("factors", np.empty(0, np.float32))
        if found.shape != (len(self.manifest.class_names),) or not (found > 0).all():
            raise BundleError(
                f"{self.path}: expected in {TEXT_EMBEDDINGS} a factor above 0 for each of its "
                f"classes, for its calibration is distance-aware; export it again"
            )
        return found


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle folder or a zip of one. Files are checked when they are read.

    Raises:
        BundleError: it is no bundle, has another schema version, or names files outside itself.
    """
    path = expand_home(path)
    if not path.exists():
        raise BundleError(f"{path}: no such bundle; expected a folder or zip from capt-export")
    manifest = Manifest.from_json(
        _read_member(path, MANIFEST, _LARGEST_MANIFEST), f"{path}/{MANIFEST}"
    )
    graphs = manifest.graphs.values()
    names = [*manifest.files, *(g.file for g in graphs), *(g.weights for g in graphs if g.weights)]
    if manifest.open_vocabulary is not None:
        names += manifest.open_vocabulary.files
    if escaping := [name for name in names if not is_inside(name)]:
        raise BundleError(f"{path}: {escaping[0]!r} leads out of the bundle; do not trust it")
    return Bundle(path, manifest)


def is_bundle(path: Path) -> bool:
    """Tell whether `path` looks like a bundle folder, a zip, or a lone ONNX file."""
    return (path / MANIFEST).is_file() or (
        path.is_file() and path.suffix in (".onnx", ".zip", ".capt")
    )


def _read_member(path: Path, name: str, limit: int) -> bytes:
    try:
        if path.is_dir():
            return (path / name).read_bytes()
        with zipfile.ZipFile(path) as archive:
            # A zip of the folder holds either its files or the folder itself.
            for member in archive.namelist():
                if member == name or member.split("/", 1)[1:] == [name]:
                    if archive.getinfo(member).file_size > limit:
                        raise BundleError(f"{path}: {name} is larger than {limit} bytes")
                    return archive.read(member)
    except _UNREADABLE as cause:
        raise BundleError(f"{path}: cannot read {name} ({cause}); is it a bundle?") from cause
    raise BundleError(f"{path}: holds no {name}; is it a bundle?")
