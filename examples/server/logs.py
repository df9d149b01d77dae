"""The server's log: a few records a minute of each kind, whatever clients do."""

import logging

_SECONDS, _MOST = 60.0, 10


class FewOfAKind(logging.Filter):
    """Lets through 10 records a minute from each line of code, and counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, int], tuple[float, int]] = {}  # since when, how many

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to write a record; the first one of a minute says what was left out."""
        kind = record.pathname, record.lineno
        start, count = self._seen.get(kind, (record.created, 0))
        if record.created - start >= _SECONDS:
            if count > _MOST:
                record.msg = f"{record.getMessage()} [and {count - _MOST} more like it before]"
                record.args = None
            start, count = record.created, 0
        self._seen[kind] = start, count + 1
        return count < _MOST


def bound_log() -> None:
    """Write warnings of all libraries to stderr, a few a minute of each kind."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)  # Pillow's, whose texts differ from image to image
    handler.addFilter(FewOfAKind())
