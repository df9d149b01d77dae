"""Object stores and Parquet files, through pyarrow, which only this file imports.

A place is named by a local path or by a URI, such as `s3://bucket/photos`.
"""

import io
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from capt_deploy.core.errors import DataError, ImageError
from capt_deploy.core.files import write_bytes

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/]*)(/.*)?", re.DOTALL)
# None of these fetches from the web.
_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")
_LARGEST_PHOTO = 2**30  # bytes of an encoded photo
_PAUSES = (1.0, 4.0)  # seconds before a photo is asked for again, which its store did not give
_ERROR = "error"
PATH, BYTES = "path", "bytes"  # columns of tables of photos


class Table(NamedTuple):
    """What the footer of a Parquet file says about the photos in it."""

    rows: int
    encoded: bool  # whether the table holds photos, in BYTES, or only names, in PATH


def is_uri(name: str) -> bool:
    """Return whether a name is a URI and no local path."""
    return _URI.fullmatch(name) is not None


def local_path(name: str) -> str | None:
    """Return the path of a local file, also of a `file:///…`; None for what is in a store."""
    match = _URI.fullmatch(name)
    if match is None:
        return name
    return match[3] if match[1] == "file" and not match[2] else None


def _locate(name: str) -> tuple[Any, str]:
    """Return pyarrow's file system of a place, and the place's path in it."""
    import pyarrow.fs

    match = _URI.fullmatch(name)
    if match is None:
        return pyarrow.fs.LocalFileSystem(), name
    scheme, host, path = match.groups(default="")
    _check(name, scheme, host)
    system, root = _open_store(scheme, host)
    return system, root + path.lstrip("/")


def _check(name: str, scheme: str, host: str) -> None:
    if scheme not in _SCHEMES:
        raise DataError(f"{name}: expected a URI that begins with one of {', '.join(_SCHEMES)}")
    if ":" in host.rpartition("@")[0]:
        raise DataError(
            f"{scheme}://…@…: expected no password in the URI, for it would be in every row; "
            f"set the store's environment variables, such as AWS_ACCESS_KEY_ID"
        )


@cache
def _open_store(scheme: str, host: str) -> tuple[Any, str]:
    import pyarrow.fs

    uri, endpoint = f"{scheme}://{host}/x", os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:  # of another maker's store, for which pyarrow does not look
        protocol, _, address = endpoint.rstrip("/").rpartition("://")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        uri += f"?endpoint_override={address}&scheme={protocol or 'https'}&region={region}"
    try:
        system, path = pyarrow.fs.FileSystem.from_uri(uri)
    except (OSError, ValueError, pyarrow.ArrowException) as cause:
        reason = str(cause).partition("\n")[0]  # libhdfs lists a hundred places
        raise DataError(f"{scheme}://{host}: cannot be opened ({reason})") from cause
    return system, path.removesuffix("x")


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Raise what pyarrow raises about a place as a `DataError`."""
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as cause:
        raise DataError(f"{name}: cannot be read ({cause})") from cause


def list_files(name: str) -> list[str]:
    """Return the visible files below a folder, sorted, or the file itself.

    Raises:
        DataError: there is nothing, or it cannot be listed.
    """
    from pyarrow.fs import FileSelector, FileType

    system, path = _locate(name)
    with _errors_of(name):
        kind = system.get_file_info(path).type
        if kind == FileType.NotFound:
            raise DataError(f"{name}: no such file or folder")
        if kind == FileType.File:
            return [name]
        path = path.rstrip("/") or "/"
        inside = [
            info.path[len(path.rstrip("/")) + 1 :]
            for info in system.get_file_info(FileSelector(path, recursive=True))
            if info.is_file
        ]
    top = name.rstrip("/")
    return [f"{top}/{file}" for file in sorted(inside) if not re.search(r"(^|/)\.", file)]


def read_photo(name: str) -> bytes:
    """Return the content of a photo in a store.

    Raises:
        ImageError: it is missing or larger than 1 GiB, its URI cannot be used, or the store did not
            open or give it in three tries.
    """
    for pause in (*_PAUSES, None):
        try:
            with _errors_of(name):
                system, path = _locate(name)
                with system.open_input_file(path) as file:
                    if (size := file.size()) > _LARGEST_PHOTO:
                        raise ImageError(f"{name}: expected at most 1 GiB, came {size:,} bytes")
                    return bytes(file.read())
        except DataError as error:
            cause = error.__cause__
            if isinstance(cause, FileNotFoundError):
                raise ImageError(f"{name}: no such file") from cause
            if pause is None or not isinstance(cause, OSError):  # which may pass
                raise ImageError(str(error)) from cause
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def open_table(name: str) -> Table:
    """Return the number of rows of a Parquet file, and whether they hold encoded photos.

    Raises:
        DataError: it cannot be read, or has no column of photos or of their names.
    """
    import pyarrow as pa

    with _errors_of(name), _parquet_file(name) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    types = {field.name: field.type for field in schema}
    encoded = types.get(BYTES) in (pa.binary(), pa.large_binary())
    named = types.get(PATH) in (pa.string(), pa.large_string())
    if not encoded and not named:
        found = ", ".join(f"{column} ({kind})" for column, kind in types.items())
        raise DataError(
            f"{name}: expected a column {BYTES!r} of encoded photos (binary) or {PATH!r} of their "
            f"names (string), came {found or 'no column'}"
        )
    return Table(rows, encoded)


@contextmanager
def _parquet_file(name: str) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    system, path = _locate(name)
    with system.open_input_file(path) as source, ParquetFile(source) as file:
        yield file


def read_paths(name: str) -> list[str | None]:
    """Return the column PATH of a Parquet file.

    Raises:
        DataError: it cannot be read.
    """
    with _errors_of(name), _parquet_file(name) as file:
        paths: list[str | None] = file.read([PATH]).column(PATH).to_pylist()
    return paths


def read_photos(
    name: str, start: int, stop: int, batch: int
) -> Iterator[tuple[str | None, bytes | None]]:
    """Yield PATH, None without such a column, and BYTES of the rows from `start` to `stop`.

    Raises:
        DataError: the file cannot be read.
    """
    with _errors_of(name), _parquet_file(name) as file:
        columns = [column for column in (PATH, BYTES) if column in file.schema_arrow.names]
        groups: list[int] = []
        position = first = 0
        for group in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if end > start and first < stop:
                position = position if groups else first
                groups.append(group)
            first = end
        for rows in file.iter_batches(batch, row_groups=groups, columns=columns):
            skipped = max(0, start - position)
            for row in rows.slice(skipped, max(0, stop - position - skipped)).to_pylist():
                yield row.get(PATH), row[BYTES]
            position += len(rows)


def parquet_of(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows of `capt-predict`, as `LabelledFile.to_dict` gives them, as a Parquet file."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    class_share = pa.struct([("label", pa.string()), ("confidence", pa.float32())])
    columns = {
        "path": pa.string(),
        "label": pa.string(),
        "confidence": pa.float32(),
        "top_k": pa.list_(class_share),
        "prediction_set": pa.list_(pa.string()),
        "rejected": pa.bool_(),
        "familiarity": pa.float64(),
        "confused_with": class_share,
        _ERROR: pa.string(),
    }
    sink = io.BytesIO()
    write_table(pa.Table.from_pylist([*rows], schema=pa.schema([*columns.items()])), sink)
    return sink.getvalue()


class Folder:
    """A folder of results, local or in a store. A file in it is complete or absent."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._system, self._path = _locate(name)

    def _named(self, file: str) -> str:
        return f"{self._path.rstrip('/')}/{file}"

    def files(self) -> set[str]:
        """Return the names of what is in the folder; nothing where there is no folder.

        Raises:
            DataError: it is a file, or cannot be listed.
        """
        from pyarrow.fs import FileSelector

        with _errors_of(self.name):
            selector = FileSelector(self._path, allow_not_found=True)
            return {info.base_name for info in self._system.get_file_info(selector)}

    def read(self, file: str) -> bytes:
        """Return the content of a file.

        Raises:
            DataError: it cannot be read.
        """
        with _errors_of(self._named(file)), self._system.open_input_file(self._named(file)) as open:
            return bytes(open.read())

    def write(self, file: str, data: bytes) -> None:
        """Write a file under a temporary name, then rename it.

        Raises:
            OSError: it cannot be written.
        """
        if not is_uri(self.name):
            return write_bytes(Path(self._path, file), data)
        temporary = self._named(f".{file}.{secrets.token_hex(4)}.tmp")
        self._system.create_dir(self._path, recursive=True)
        with self._system.open_output_stream(temporary) as stream:
            stream.write(data)
        self._system.move(temporary, self._named(file))

    def remove(self, file: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self._system.delete_file(self._named(file))

    def count(self, file: str) -> tuple[int, int]:
        """Return the number of rows in a file of rows, and that of errors.

        Raises:
            DataError: it is damaged.
        """
        where = f"{self.name.rstrip('/')}/{file}"
        with _errors_of(where), _parquet_file(where) as opened:
            errors = opened.read([_ERROR]).column(_ERROR)
        return len(errors), len(errors) - errors.null_count
