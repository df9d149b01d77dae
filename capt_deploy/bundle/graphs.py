"""The graphs of a bundle, or a lone one, with the manifest that each carries inside."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from capt_deploy.bundle.manifest import PRECISION_KEY, Manifest
from capt_deploy.bundle.onnx_metadata import read_metadata
from capt_deploy.bundle.read import Bundle, open_bundle
from capt_deploy.core.errors import BundleError
from capt_deploy.core.files import expand_home


@dataclass(frozen=True)
class StoredGraph:
    """A graph as backends want it."""

    onnx: bytes
    precision: str
    weights_folder: Path | None = None  # where weights lie that are not in the graph's own file


class Graphs(Protocol):
    """What a classifier can be loaded from."""

    @property
    def manifest(self) -> Manifest:
        """Return what it says of itself."""
        ...

    @property
    def bundle(self) -> Bundle | None:
        """Return the bundle; None of a lone graph."""
        ...

    @property
    def precisions(self) -> Iterable[str]:
        """Return those that there are, in the bundle's order."""
        ...

    def read(self, precision: str) -> StoredGraph:
        """Return the graph in one of them."""
        ...


def open_graphs(path: str | Path) -> Graphs:
    """Open a bundle folder, a zip of one, or a lone `model.onnx`.

    Raises:
        BundleError: it is damaged or unknown.
    """
    path = expand_home(path)
    return LoneGraph(path) if path.suffix == ".onnx" else BundleGraphs(path)


class BundleGraphs:
    """Those of a bundle. The last one read stays in memory, for the next backend to be tried."""

    def __init__(self, path: Path) -> None:
        self.bundle = open_bundle(path)
        self.manifest = self.bundle.manifest
        self._last: StoredGraph | None = None
        if not self.manifest.verified:
            warnings.warn(f"{path}: was exported although its check had failed", stacklevel=4)

    @property
    def precisions(self) -> Iterable[str]:
        """Return those that there are, in the bundle's order."""
        return self.manifest.graphs

    def read(self, precision: str) -> StoredGraph:
        """Return the graph in one of them.

        Raises:
            BundleError: there is none, or it or the manifest was changed.
        """
        if self._last is None or self._last.precision != precision:
            self._last = None  # before the next one is there as well
            self._last = self._read(precision)
        return self._last

    def _read(self, precision: str) -> StoredGraph:
        path = self.bundle.path
        _, onnx = self.bundle.graph(precision)
        # Only the graph is hashed: a manifest with other names would mislabel every image.
        inside = Manifest.from_json(read_metadata(onnx) or "", f"{path}, inside the graph")
        if replace(self.manifest, files={}) != inside:
            raise BundleError(f"{path}: its manifest was changed after the export; export it again")
        return StoredGraph(onnx, precision, self.bundle.weights_folder(precision))


class LoneGraph:
    """A `model.onnx` without its bundle."""

    bundle = None

    def __init__(self, path: Path) -> None:
        try:
            onnx = path.read_bytes()
        except OSError as cause:
            raise BundleError(f"{path}: cannot be read ({cause})") from cause
        text = read_metadata(onnx)
        if text is None:
            raise BundleError(f"{path}: carries no manifest; expected a graph from capt-export")
        self.manifest = Manifest.from_json(text, str(path))
        graphs = self.manifest.graphs
        precision = read_metadata(onnx, PRECISION_KEY) or next(iter(graphs))
        if precision not in graphs:
            raise BundleError(f"{path}: its manifest knows no {precision} graph; export it again")
        if graphs[precision].weights:
            raise BundleError(f"{path}: its weights are in a second file; load the whole bundle")
        self.precisions = (precision,)
        self._graph = StoredGraph(onnx, precision)

    def read(self, precision: str) -> StoredGraph:
        """Return the graph.

        Raises:
            BundleError: it has another precision.
        """
        if precision != self._graph.precision:
            raise BundleError(f"expected a {precision} graph, came one in {self._graph.precision}")
        return self._graph
