"""A folder of results that can be continued: what it belongs to, and which parts are done."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from capt_deploy.bulk.storage import Folder, parquet_of
from capt_deploy.core.errors import ConfigError, DataError
from capt_deploy.core.files import parse_json

# Readers of Parquet folders pass over what begins with an underscore.
JOB = "_capt_predict.json"
_SUFFIX = ".parquet"
_LEFT = re.compile(rf"\.(part-\d+{re.escape(_SUFFIX)}|{re.escape(JOB)})\.[0-9a-f]{{8}}\.tmp")


class Results:
    """Rows in a folder, one Parquet file for each part."""

    def __init__(self, folder: str) -> None:
        self._folder = Folder(folder)

    def begin(self, job: Mapping[str, Any], parts: int) -> set[int]:
        """Begin a job or continue it; return the numbers of the parts that are done.

        Args:
            job: what decides on the rows, as JSON; it is kept beside them.
            parts: number of parts of the job.

        Raises:
            ConfigError: the folder holds something else, or the results of another job.
        """
        name, found = self._folder.name, self._folder.files()
        left = {file for file in found if _LEFT.fullmatch(file)}  # by a process that was killed
        files = found - left
        done = {number for number in range(parts) if _file(number) in files}
        rows = any(file.endswith(_SUFFIX) for file in files)
        if JOB in files and rows:
            kept = parse_json(self._folder.read(JOB), f"{name}/{JOB}", DataError)
            if kept != job:
                changed = ", ".join(_differences(kept, job)) or "its form"
                raise ConfigError(
                    f"{name}: expected the job that these results were begun with, came another "
                    f"one (changed: {changed}); repeat the first command, or choose another folder"
                )
        elif files and JOB not in files:
            raise ConfigError(
                f"{name}: expected a new folder, or one of results to be continued, came one with "
                f"{min(files)}; choose another folder"
            )
        else:
            text = json.dumps(job, indent=2, ensure_ascii=True)
            self._folder.write(JOB, text.encode() + b"\n")
        for file in left:
            self._folder.remove(file)
        return done

    def write(self, part: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of a part, all of them or none.

        Raises:
            OSError: they cannot be written.
        """
        self._folder.write(_file(part), parquet_of(rows))

    def count(self, parts: int) -> tuple[int, int]:
        """Return the number of rows of all parts, and that of errors among them.

        Raises:
            DataError: a part is missing or damaged.
        """
        counts = [self._folder.count(_file(number)) for number in range(parts)]
        return sum(rows for rows, _ in counts), sum(errors for _, errors in counts)


def _file(part: int) -> str:
    return f"part-{part:05d}{_SUFFIX}"


def _differences(kept: Any, job: Mapping[str, Any]) -> list[str]:
    if not isinstance(kept, Mapping):
        return []
    return [key for key in sorted({*kept, *job}) if kept.get(key) != job.get(key)]
