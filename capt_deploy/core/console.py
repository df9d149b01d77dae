"""What all commands share: error handling, progress, tables, JSON."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from shutil import get_terminal_size
from typing import Any, TypeVar

import click

from capt_deploy.core.errors import CaptError
from capt_deploy.core.files import expand_home

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 5.0
_BAR_WIDTH = 20
_TRAINING_MODULES = {
    *("torch", "torchvision", "open_clip", "jaxtyping", "filelock", "matplotlib", "sklearn"),
    *("onnx", "onnxscript"),
}
_INSTALL = "pip install 'capt[export]' to tune and export; the bare install only runs bundles"


class PathInHome(click.Path):
    """A path argument in which a leading `~` is understood, also as in `--out=~/x`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a `Path`."""
        return expand_home(os.fsdecode(super().convert(value, param, ctx)))


class Command(click.Command):
    """A click command that turns a `CaptError` into one line on stderr and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; 2 is the exit code of bad input, 1 that of a failed gate."""
        try:
            with _ended_like_an_interrupt():
                return super().invoke(ctx)
        except CaptError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # the reader has seen enough, as in `… | head`
            raise
        except OSError as error:  # no space, no permission, a file where a folder should be
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)
        except ModuleNotFoundError as error:
            if error.name not in _TRAINING_MODULES:
                raise
            click.echo(f"Error: needs {error.name}, which is missing: {_INSTALL}", err=True)
            ctx.exit(2)
        except _Terminated:
            click.echo("terminated", err=True)
            ctx.exit(143)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, with which schedulers and `timeout` end a program."""


@contextmanager
def _ended_like_an_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that half-written files are removed."""

    def end(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(text: str) -> None:
    """Tell the person something; on stderr, so that stdout stays machine-readable."""
    click.echo(text, err=True)


def print_json(value: Any) -> None:
    """Print `value` as JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


class Progress:
    """Counts steps: a bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = self._printed = 0
        self._note = ""
        self._printed_at = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = click.progressbar(
                length=total,
                label=label,
                file=sys.stderr,
                show_pos=True,
                width=_BAR_WIDTH,
                item_show_func=lambda _: self._fitting_note(),
            )
            self._bar.__enter__()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Add `steps` done ones; `note` is shown behind the count."""
        self._done += steps
        self._note = note
        if self._bar is not None:
            self._bar.update(steps, current_item=note)
        elif time.monotonic() - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._line()

    def close(self) -> None:
        """End the bar, or print the last line."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        elif self._printed < self._done or not self._done:
            self._line()

    def _fitting_note(self) -> str:
        # A line that wraps leaves a new line behind at every update.
        others = len(self._label) + _BAR_WIDTH + 2 * len(str(self._total)) + len("  []  /    ")
        time_left = len("  00:00:00")
        return self._note[: max(0, get_terminal_size().columns - others - time_left - 2)]

    def _line(self) -> None:
        self._printed_at = time.monotonic()
        self._printed = self._done
        note = f"  {self._note}" if self._note else ""
        say(f"{self._label}: {self._done}/{self._total} {self._unit}{note}")


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Progress]:
    """Open a `Progress` and close it whatever happens."""
    counter = Progress(label, total, unit)
    try:
        yield counter
    finally:
        counter.close()


def track(items: Sequence[T], label: str, unit: str) -> Iterator[T]:
    """Yield `items` while showing how many are done."""
    with progress(label, len(items), unit) as counter:
        for item in items:
            yield item
            counter.advance()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return aligned columns; the first is left-aligned, the others right-aligned."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
