import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from capt_deploy.backends.spec import backend_names
from capt_deploy.cli.predict import main

GOLDEN = Path(__file__).parents[2] / "golden"
BUNDLE, PHOTOS = str(GOLDEN / "tiny.capt"), GOLDEN / "photos"


def run(*arguments, stdin=None):
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def test_json_has_a_row_for_every_image_of_a_folder():
    result = run(BUNDLE, PHOTOS, "--json", "--top-k", "2")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    assert [Path(row["path"]).parent.name for row in rows] == [
        "blue_sky",
        "green_leaf",
        "grey_stone",
    ]
    for row in rows:
        assert row["top_k"][0]["label"] == row["label"]
        assert len(row["top_k"]) == 2
        assert 0 < row["confidence"] <= 1


def test_csv_has_the_same_rows():
    rows = list(csv.DictReader(io.StringIO(run(BUNDLE, PHOTOS, "--csv").stdout)))
    wanted = json.loads(run(BUNDLE, PHOTOS, "--json").stdout)
    assert [(row["path"], row["label"]) for row in rows] == [
        (w["path"], w["label"]) for w in wanted
    ]


def test_plain_output_is_one_line_an_image():
    lines = run(BUNDLE, PHOTOS).stdout.splitlines()
    assert len(lines) == 3
    assert all(".png: " in line for line in lines)


def test_paths_come_from_patterns_and_from_stdin():
    pattern = run(BUNDLE, PHOTOS / "*" / "g*" / "*.png", "--json")
    assert len(json.loads(pattern.stdout)) == 2
    listed = "\n".join(str(p) for p in sorted(PHOTOS.rglob("*.png"))) + "\n"
    assert len(json.loads(run(BUNDLE, "-", "--json", stdin=listed).stdout)) == 3


def test_a_broken_image_gets_an_error_row_and_exit_code_1(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    good = next(iter(PHOTOS.rglob("*.png")))
    result = run(BUNDLE, broken, good, "--json")
    assert result.exit_code == 1
    first, second = json.loads(result.stdout)
    assert "broken.png" in first["error"]
    assert "label" in second


def test_a_missing_name_in_a_list_spoils_only_its_own_row():
    good = next(iter(PHOTOS.rglob("*.png")))
    result = run(BUNDLE, "-", "--csv", stdin=f"nowhere.png\n{good}\n")
    assert result.exit_code == 1
    first, second = csv.DictReader(io.StringIO(result.stdout))
    assert "no such file" in first["error"]
    assert second["label"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((BUNDLE, "nowhere.jpg"), "nowhere.jpg"),
        (("nowhere.capt", PHOTOS), "no such bundle"),
        ((PHOTOS, PHOTOS), "is it a bundle?"),
        ((BUNDLE, PHOTOS, "--backend", "quantum"), "expected one of"),
        ((BUNDLE, PHOTOS, "--json", "--csv"), "not both"),
        ((BUNDLE, "-"), "found no image"),
        ((BUNDLE, "a" * 300 + ".jpg"), "name too long"),
        ((BUNDLE,), "Missing argument"),
        ((BUNDLE, PHOTOS, "--ray"), "--ray and --out FOLDER need each other"),
        ((BUNDLE, PHOTOS, "--out", "x"), "--ray and --out FOLDER need each other"),
        ((BUNDLE, PHOTOS, "--ray", "--out", "x", "--csv"), "leave out --csv"),
        ((BUNDLE, "--ray", "photos/", "--out", "x"), "write paths before --ray"),
    ],
)
def test_bad_input_is_one_error_and_exit_code_2(arguments, said):
    result = run(*arguments, stdin="")
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_without_ray_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run(BUNDLE, PHOTOS, "--ray", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "--ray needs ray" in result.stderr and "pip install '.[ray]'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_backend():
    text = " ".join(run("--help").stdout.split())
    assert all(
        f"{name}," in text or f"{name}." in text or f"{name} or" in text for name in backend_names()
    )


def test_what_runs_and_what_does_not_is_said_on_stderr():
    said = run(BUNDLE, PHOTOS, "--backend", "onnxruntime-cpu").stderr
    assert said == "3 images, onnxruntime on cpu, fp32\n"
    reasons = run(BUNDLE, PHOTOS).stderr.splitlines()[1:]
    assert all(line.startswith("  not ") and ": " in line for line in reasons)


def test_fast_decoding_is_only_done_where_it_is_asked_for(tmp_path):
    photo = Image.open(next(iter(PHOTOS.rglob("*.png")))).resize((640, 480))
    photo.save(tmp_path / "large.jpg")
    exact, fast = (
        json.loads(run(BUNDLE, tmp_path, "--json", *more).stdout)[0]["confidence"]
        for more in ((), ("--fast-decode",))
    )
    assert exact != fast
    assert exact == pytest.approx(fast, abs=0.05)


@pytest.mark.skipif(os.name != "posix", reason="signals are sent otherwise elsewhere")
@pytest.mark.parametrize("form", [[], ["--csv"], ["--json"]])
def test_ctrl_c_ends_it_at_once_without_a_traceback(tmp_path, form):
    photo = Path(shutil.copy(next(iter(PHOTOS.rglob("*.png"))), tmp_path / "0.png"))
    for number in range(1, 6_000):  # a file has a limited number of links: those of a copy
        (tmp_path / f"{number}.png").hardlink_to(photo)
    code = "from capt_deploy.cli.predict import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, BUNDLE, str(tmp_path), *form],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        if form == ["--json"]:  # which prints at the end
            while not command.stderr.readline().startswith("6,000 images"):
                assert command.poll() is None
            time.sleep(0.2)
        else:
            assert "," in command.stdout.readline()
            command.stdout.readline()
        command.send_signal(signal.SIGINT)
        stdout, stderr = command.communicate(timeout=60)
    assert command.returncode == 130, stderr
    assert stderr.endswith("interrupted\n")
    assert "Traceback" not in stderr
    assert stdout.count("\n") < 6_000


def test_sets_and_rejections_are_in_all_forms(decided_bundle):
    wanted = ("--coverage", "0.8", "--accuracy", "0.7")
    rows = json.loads(run(decided_bundle, PHOTOS, "--json", *wanted).stdout)
    table = list(csv.DictReader(io.StringIO(run(decided_bundle, PHOTOS, "--csv", *wanted).stdout)))
    lines = run(decided_bundle, PHOTOS, *wanted).stdout.splitlines()
    assert len(rows) == len(table) == len(lines) == 3
    for row, own, line in zip(rows, table, lines, strict=True):
        assert own["prediction_set"] == "; ".join(row["prediction_set"])
        assert own["rejected"] == json.dumps(row["rejected"])
        assert ("(rejected)" in line) == row["rejected"]
        assert line.endswith(f"one of: {own['prediction_set']}")
        assert row["prediction_set"][0] == row["label"]


def test_unfamiliar_images_are_rejected_on_request(decided_bundle):
    rows = json.loads(run(decided_bundle, PHOTOS, "--json", "--reject-unfamiliar", "0.5").stdout)
    assert [row["rejected"] for row in rows] == [row["familiarity"] < 0.5 for row in rows]
    assert run(BUNDLE, PHOTOS, "--reject-unfamiliar", "0.5").exit_code == 2


def test_one_image_is_counted_in_the_singular():
    result = run(BUNDLE, next(iter(PHOTOS.rglob("*.png"))), "--backend", "onnxruntime-cpu")
    assert result.stderr == "1 image, onnxruntime on cpu, fp32\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reject-unfamiliar", "1.5"), "familiarity: expected a share between 0 and 1"),
        (("--accuracy", "0.9999"), "cannot be promised with a certainty of 0.95; the most is 0."),
        (
            ("--coverage", "90"),
            "expected a share between 0 and 1, such as 0.9; came 90.0",
        ),
    ],
)
def test_a_promise_that_cannot_be_kept_is_an_error(decided_bundle, options, message):
    result = run(decided_bundle, PHOTOS, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_bundle_that_promises_nothing_says_so_when_asked_for_the_usual_coverage():
    result = run(BUNDLE, PHOTOS, "--coverage", "0.9")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "tune with two photos of each class or more" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has file names that are no text")
@pytest.mark.parametrize("encoding", ["utf-8:strict", "cp1252:strict"])
def test_names_that_the_output_cannot_hold_are_escaped_and_no_row_is_lost(tmp_path, encoding):
    for name in (b"caf\xe9.png", "żółw.png".encode(), b"z.png"):
        shutil.copy(next(PHOTOS.rglob("*.png")), os.fsencode(tmp_path) + b"/" + name)
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", "from capt_deploy.cli.predict import main; main()", BUNDLE]
    listed = b"\n".join(os.fsencode(file) for file in sorted(tmp_path.iterdir()))
    for arguments, text in (([tmp_path], None), (["-"], listed)):
        for form in ("--json", "--csv", "--top-k=1"):
            done = subprocess.run(
                [*command, *arguments, form],
                input=text,
                capture_output=True,
                env=environment,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            out = done.stdout.decode(encoding.split(":", maxsplit=1)[0])
            if form == "--json":
                names = [Path(row["path"]).name for row in json.loads(out)]
                assert names == ["caf\\udce9.png", "z.png", "żółw.png"]
            else:
                assert "caf\\udce9.png" in out and "z.png" in out and len(out.splitlines()) >= 3
