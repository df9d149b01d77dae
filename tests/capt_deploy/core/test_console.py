"""What a person sees: one line for an error, plain progress without a terminal, tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capt_deploy.core import console
from capt_deploy.core.errors import BackendError, BundleError, CaptError, DataError, GateError
from capt_deploy.core.install import install_hint

ROOT = Path(__file__).resolve().parents[3]


def command(error: BaseException | None) -> click.Command:
    @click.command(cls=console.Command)
    def run() -> None:
        click.echo("started")
        if error:
            raise error

    return run


def invoke(
    error: BaseException | None, capsys: pytest.CaptureFixture[str]
) -> tuple[object, str, str]:
    """Return exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        command(error).main([])
    return (ended.value.code, *capsys.readouterr())


@pytest.mark.parametrize(
    ("error", "code"),
    [(CaptError, 2), (DataError, 2), (BundleError, 2), (BackendError, 2), (GateError, 1)],
)
def test_an_expected_error_is_one_line_on_stderr_and_an_exit_code(
    error: type[CaptError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = invoke(error("pets: expected a folder"), capsys)
    assert ended == (code, "started\n", "Error: pets: expected a folder\n")


def test_without_an_error_the_exit_code_is_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(None, capsys) == (0, "started\n", "")


def test_a_bug_is_not_hidden_as_an_expected_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        command(ZeroDivisionError("bug")).main([])
    assert capsys.readouterr().err == ""


def test_a_process_ends_with_the_line_and_no_traceback() -> None:
    script = (
        "import click; from capt_deploy.core.console import Command\n"
        "from capt_deploy.core.errors import GateError\n"
        "@click.command(cls=Command)\n"
        "def run(): raise GateError('logits differ by 3')\n"
        "run()\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: logits differ by 3\n"


def test_json_goes_to_stdout_and_words_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("3 images")
    console.print_json({"label": "käse", "share": 0.5})
    printed = capsys.readouterr()
    assert printed.err == "3 images\n"
    assert json.loads(printed.out) == {"label": "käse", "share": 0.5}
    assert "käse" in printed.out


def test_a_library_logs_and_prints_nothing() -> None:
    script = (
        "from capt_deploy.core.console import say, track, warn\n"
        "say('a note'); warn('a warning'); list(track('ab', 'reading', 'files'))\n"
        "import logging; logging.basicConfig(level='INFO', format='%(name)s %(levelname)s "
        "%(message)s')\n"
        "say('100% sure'); warn('a warning'); list(track('ab', 'reading', 'files'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "capt INFO 100% sure",
        "capt WARNING a warning",
        "capt INFO reading: 2/2 files",
    ]


def test_messages_of_a_command_are_plain_and_printed_once() -> None:
    script = (
        "import click, logging\n"
        "from capt_deploy.core.console import Command, say, warn\n"
        "@click.command(cls=Command)\n"
        "def run():\n"
        "    logging.info('sets up the root logger'); say('a note'); warn('a warning')\n"
        "run(standalone_mode=False); say('the command has ended')\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "a note\na warning\n")


@pytest.mark.parametrize(("option", "shown"), [((), False), (("-W", "always"), True)])
def test_words_of_pillow_do_not_stand_between_answers(option: tuple[str, ...], shown: bool) -> None:
    script = (
        "import click, threading, warnings\n"
        "from capt_deploy.core.console import Command\n"
        "@click.command(cls=Command)\n"
        "def run():\n"
        "    for module in ('PIL.TiffImagePlugin', 'elsewhere'):\n"
        "        words = ('Corrupt EXIF of ' + module, UserWarning, 'file.py', 1, module)\n"
        "        thread = threading.Thread(target=warnings.warn_explicit, args=words)\n"
        "        thread.start(); thread.join()\n"
        "run()\n"
    )
    command = [sys.executable, "-B", *option, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("Corrupt EXIF of PIL" in done.stderr) == shown
    assert "Corrupt EXIF of elsewhere" in done.stderr


@pytest.mark.parametrize(("number", "text"), [(0, "0 entries"), (1, "1 entry"), (2, "2 entries")])
def test_numbers_agree_with_their_nouns(number: int, text: str) -> None:
    assert console.counted(number, "entry", "entries") == text
    assert console.counted(number, "image") == f"{number} image{'' if number == 1 else 's'}"


def test_nan_is_no_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        console.print_json({"share": float("nan")})


def test_progress_without_a_terminal_ends_in_one_plain_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with console.progress("reading", 40, "images") as counter:
        for _ in range(20):
            counter.advance(2, note="cat.jpg")
    assert capsys.readouterr() == ("", "reading: 40/40 images  cat.jpg\n")


def test_progress_of_nothing_still_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("reading", 0, "images"):
        pass
    assert capsys.readouterr().err == "reading: 0/0 images\n"


def test_progress_prints_a_line_each_time_enough_seconds_have_passed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0.0)
    with console.progress("tuning", 3, "steps") as counter:
        for loss in ("2.1", "1.7", "1.2"):
            counter.advance(note=loss)
    lines = capsys.readouterr().err.splitlines()
    # the last one is not printed twice
    assert lines == [
        f"tuning: {n}/3 steps  {loss}" for n, loss in ((1, "2.1"), (2, "1.7"), (3, "1.2"))
    ]


def test_progress_tells_how_far_it_came_before_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with (
        pytest.raises(ValueError, match="stop"),
        console.progress("reading", 9, "images") as counter,
    ):
        counter.advance(4)
        raise ValueError("stop")
    assert capsys.readouterr().err == "reading: 4/9 images\n"


def test_track_yields_everything_and_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.track(["a", "b"], "reading", "files")) == ["a", "b"]
    assert capsys.readouterr().err == "reading: 2/2 files\n"


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_progress_on_a_terminal_is_a_bar_with_its_note() -> None:
    master, slave = os.openpty()
    script = (
        "from capt_deploy.core.console import messages_on_stderr, progress, say\n"
        "with messages_on_stderr(), progress('reading', 4, 'images') as counter:\n"
        "    for n in range(4): counter.advance(note=f'photo{n}')\n"
        "    say('a note')\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=slave,
        check=True,
    )
    os.close(slave)
    shown = b""
    try:
        while block := os.read(master, 65536):
            shown += block
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(master)
    assert done.stdout == b""
    assert b"\r" in shown
    assert b"4/4" in shown
    assert b"photo3" in shown
    assert b"\ra note" in shown  # at the beginning of a line, not behind the bar
    assert b"reading: 4/4" not in shown


def test_a_table_aligns_names_left_and_numbers_right() -> None:
    text = console.table(
        ["%", "base", "new"], [["zero-shot", "9.5", "100.0"], ["tuned", "81.0", "-"]]
    )
    assert text.split("\n") == [
        "%          base    new",
        "---------  ----  -----",
        "zero-shot   9.5  100.0",
        "tuned      81.0      -",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert console.table(["a", "bc"], []) == "a  bc\n-  --"


cells = st.text(st.sampled_from("abc 1."), max_size=6)


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1)
    )
)
def test_every_cell_of_a_table_ends_where_its_column_ends(rows: list[list[str]]) -> None:
    header, *body = rows
    lines = console.table(header, body).split("\n")
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    assert len(lines) == len(rows) + 1
    for row, line in zip(rows, [lines[0], *lines[2:]], strict=True):
        assert line == line.rstrip()
        padded = line.ljust(sum(widths) + 2 * (len(widths) - 1))
        end = widths[0]
        assert padded[: len(row[0])] == row[0]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            end += 2 + width
            assert padded[end - len(cell) : end] == cell


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (PermissionError(13, "Permission denied", "/x"), 2, "Error: [Errno 13] Permission denied"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, install_hint("export")),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_is_no_bug_is_one_line_and_a_code(
    problem: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, _, stderr = invoke(problem, capsys)
    assert ended == code
    assert said in stderr
    assert len(stderr.splitlines()) == 1


def test_a_missing_module_that_is_no_extra_is_a_bug_and_stays_one() -> None:
    with pytest.raises(ModuleNotFoundError):
        command(ModuleNotFoundError("No module named 'numpi'", name="numpi")).main([])


@pytest.mark.skipif(os.name != "posix", reason="Windows ends processes without a signal")
def test_a_terminated_process_leaves_nothing_half_written(tmp_path: Path) -> None:
    code = (
        "import sys, time, click\n"
        "from pathlib import Path\n"
        "from capt_deploy.core import console, files\n"
        "@click.command(cls=console.Command)\n"
        "def run():\n"
        "    with files.new_folder(Path(sys.argv[1])) as folder:\n"
        "        (folder / 'half').write_text('x')\n"
        "        print('writing', flush=True)\n"
        "        time.sleep(60)\n"
        "run.main([])\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "out.capt")]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "writing\n"
        assert [*tmp_path.iterdir()]
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (143, "terminated\n")
    assert not [*tmp_path.iterdir()]
