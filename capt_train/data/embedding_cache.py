"""Image embeddings on disk, keyed by the content of model and image.

One SQLite file per model: its transactions survive kills and concurrent runs. Losing the cache
costs time, never a result: each embedding has a checksum, and one that does not fit is embedded
again; a damaged file is put aside, and without a writable one images are embedded again.
"""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from capt_deploy.core.console import say
from capt_deploy.core.files import cache_folder

Floats = NDArray[np.float32]
_PIXELS_VERSION = 1  # raise it when decoding or preprocessing changes the pixels
_FORMAT = 2  # of the file
_CHECKSUM = 16  # bytes behind each embedding
# A damaged file may hold bytes that are no text where sqlite3 reports what is wrong.
_DAMAGED = (OSError, sqlite3.Error, UnicodeDecodeError)
_SELECT = (  # SQLite limits the variables of a statement, but not the length of a JSON list
    "SELECT image, embedding FROM embeddings WHERE image IN (SELECT value FROM json_each(?))"
)


class EmbeddingCache:
    """A map from the SHA-256 of an image file to its embedding, for one model."""

    def __init__(
        self, model_fingerprint: str, device: str = "cpu", folder: Path | None = None
    ) -> None:
        folder = folder or cache_folder()
        # Everything that may change the last digits of an embedding is in the name of the file.
        key = f"{model_fingerprint} {device} {_PIXELS_VERSION} {PIL.__version__} {_FORMAT}"
        self._path = folder / f"embeddings-{hashlib.sha256(key.encode()).hexdigest()[:32]}.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = _connect(str(self._path))
        except _DAMAGED as cause:
            self._database = self._replacement(cause)

    def get(self, keys: Sequence[str]) -> dict[str, Floats]:
        """Return the embeddings in the cache, each (dim,), without those that are damaged."""
        embeddings: dict[str, Floats] = {}
        try:
            for key, stored in self._database.execute(_SELECT, [json.dumps(list(keys))]):
                data = stored[:-_CHECKSUM] if isinstance(stored, bytes) else b""
                if data and stored == _with_checksum(key, data):
                    embeddings[key] = np.frombuffer(data, dtype="<f4")
        except _DAMAGED as cause:
            self._database.close()
            self._database = self._replacement(cause)
        return embeddings

    def put(self, embeddings: Mapping[str, Floats]) -> None:
        """Store embeddings, all or none."""
        rows = [
            (key, _with_checksum(key, value.astype("<f4").tobytes()))
            for key, value in embeddings.items()
        ]
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", rows)
        except _DAMAGED as cause:
            self._database.close()
            self._database = self._replacement(cause)

    def _replacement(self, cause: Exception) -> sqlite3.Connection:
        """Put a damaged file aside for a new one; do without a file that cannot be used."""
        if type(cause) is sqlite3.DatabaseError:  # its subclasses are other troubles
            aside = self._path.with_suffix(".damaged")
            say(f"embedding cache: {self._path} is damaged; moved to {aside.name}")
            try:
                self._path.replace(aside)
                return _connect(str(self._path))
            except _DAMAGED as second:
                cause = second
        say(f"embedding cache: {self._path} cannot be used ({cause}); embedding without it")
        return _connect(":memory:")

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _with_checksum(key: str, data: bytes) -> bytes:
    """Return an embedding's bytes and a checksum that also tells whose they are."""
    return data + hashlib.sha256(str(key).encode() + data).digest()[:_CHECKSUM]


def _connect(path: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=60)
    database.text_factory = lambda text: text.decode(errors="replace")  # of damaged keys
    database.execute(
        "CREATE TABLE IF NOT EXISTS embeddings (image TEXT PRIMARY KEY, embedding BLOB NOT NULL)"
    )
    return database
