"""Console output: log messages and progress for all code; errors, tables and JSON of commands.

Library code calls `say`, `warn`, `progress` and `track`, which go to the logger "capt". Commands
print that logger's messages on stderr; other programs see them if they configure logging.
"""

import io
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from shutil import get_terminal_size
from typing import Any, TypeVar

import click

from capt_deploy.core.errors import CaptError
from capt_deploy.core.files import expand_home
from capt_deploy.core.install import install_hint

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 5.0
_BAR = "{desc}: |{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"
_TRAINING_MODULES = {
    *("torch", "torchvision", "open_clip", "jaxtyping", "matplotlib", "sklearn"),
    *("onnx", "onnxscript"),
}
logger = logging.getLogger("capt")
logger.addHandler(logging.NullHandler())


def say(text: str) -> None:
    """Log a note (level INFO)."""
    logger.info("%s", text)


def warn(text: str) -> None:
    """Log a warning (level WARNING)."""
    logger.warning("%s", text)


class StderrHandler(logging.Handler):
    """Prints messages as plain lines on stderr, so that stdout stays machine-readable."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message above the progress bar, if one is shown."""
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            with tqdm.external_write_mode(file=sys.stderr):
                click.echo(self.format(record), err=True)
        else:
            click.echo(self.format(record), err=True)


def _messages_are_shown() -> bool:
    return any(isinstance(handler, StderrHandler) for handler in logger.handlers)


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Print notes and warnings on stderr, and show progress, until the block ends."""
    if _messages_are_shown():
        yield
        return
    handler, level, propagate = StderrHandler(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries configure the root logger, which would print them again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class Progress:
    """Counts steps: a bar on a command's terminal, a log message every few seconds elsewhere."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done, self._logged, self._note = 0, -1, ""
        self._logged_at = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty() and _messages_are_shown():
            from tqdm import tqdm

            size = get_terminal_size()  # tqdm takes a terminal of unknown size as one of size 0
            self._bar = tqdm(
                total=total,
                desc=label,
                unit=unit,
                miniters=1,
                ncols=size.columns,
                nrows=size.lines,
                bar_format=_BAR,
            )

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more and show `note` behind the count."""
        self._done += steps
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=not steps)
            self._bar.update(steps)
        elif time.monotonic() - self._logged_at >= _SECONDS_BETWEEN_LINES:
            self._log()

    def close(self) -> None:
        """End the bar, or log the last count."""
        if self._bar is not None:
            self._bar.close()
        elif self._logged != self._done:
            self._log()

    def _log(self) -> None:
        self._logged_at, self._logged = time.monotonic(), self._done
        note = f"  {self._note}" if self._note else ""
        say(f"{self._label}: {self._done}/{self._total} {self._unit}{note}")


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Progress]:
    """Yield a `Progress` that is closed when the block ends."""
    counter = Progress(label, total, unit)
    try:
        yield counter
    finally:
        counter.close()


def track(items: Sequence[T], label: str, unit: str) -> Iterator[T]:
    """Yield each of `items` and show how many are done."""
    with progress(label, len(items), unit) as counter:
        for item in items:
            yield item
            counter.advance()


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as "1 image" or "2,000 images"."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


class PathInHome(click.Path):
    """A path argument in which a leading `~` is understood, also as in `--out=~/x`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a `Path`."""
        return expand_home(os.fsdecode(super().convert(value, param, ctx)))


class Command(click.Command):
    """A click command that turns a `CaptError` into one line on stderr and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit with 2 on bad input and with 1 on a failed gate."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # names may hold what its encoding lacks
                stream.reconfigure(errors="backslashreplace")
        try:
            with messages_on_stderr(), _sigterm_as_interrupt(), warnings.catch_warnings():
                # Words about harmless oddities of photos; `python -W` may still ask for them.
                warnings.filterwarnings("ignore", module=r"PIL\.", append=True)
                return super().invoke(ctx)
        except CaptError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # the reader has closed the pipe, as in `… | head`
            raise
        except OSError as error:  # no space, no permission, a file where a folder should be
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)
        except ModuleNotFoundError as error:
            if error.name not in _TRAINING_MODULES:
                raise
            hint = f"to tune and export, {install_hint('export')}"
            click.echo(f"Error: the package {error.name} is missing; {hint}", err=True)
            ctx.exit(2)
        except _Terminated:
            click.echo("terminated", err=True)
            ctx.exit(143)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


class SectionOption(click.Option):
    """An option that belongs to a section of the help."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


def section_option(section: str, *names: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return the decorator for an option in a section of the help of a `SectionedCommand`."""
    return click.option(*names, cls=SectionOption, section=section, **attributes)


class SectionedCommand(Command):
    """A command whose help shows its options in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options section by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        options = [option for option in self.get_params(ctx) if isinstance(option, click.Option)]
        for option in sorted(options, key=lambda option: not isinstance(option, SectionOption)):
            record = option.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(option, "section", "Other"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records, col_max=22)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, with which schedulers and `timeout` end a program."""


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
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


def print_json(value: Any) -> None:
    """Print `value` as JSON on stdout; what its encoding lacks is escaped as JSON does it."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2, allow_nan=False)
    click.echo(text)


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
