"""Three files, of any data that can be; and never over something that is not a report."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from capt_deploy.core.errors import ConfigError, DataError
from capt_deploy.report import check_folder, write_report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
FILES = ["report.html", "report.json", "report.md"]


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def loaded(folder):
    text = (folder / "report.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse_constant)


def test_a_report_is_three_files_and_can_be_written_again(make_data, tmp_path):
    folder = tmp_path / "new" / "report"
    for title in ("One", "Two"):
        assert write_report(make_data(), title, folder) == folder / "report.html"
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert all("Two" in (folder / name).read_text(encoding="utf-8") for name in FILES)


def test_the_same_data_give_the_same_files(make_data, tmp_path):
    for name in ("a", "b"):
        write_report(make_data(), "Animals", tmp_path / name)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_json_has_the_figures(make_data, tmp_path):
    data = make_data(tuned=(True, True, False, False), notes=["mind this"])
    write_report(data, "Animals", tmp_path / "r")
    found = loaded(tmp_path / "r")
    before, after = found["models"]
    assert (before["name"], after["name"], found["main"]) == ("zero-shot", "tuned", "tuned")
    assert before["all"] == after["zero_shot"]["all"]
    assert 0 < after["accuracy_intervals"]["all"][0] < after["all"]["accuracy"]
    assert after["reliability"]["new"]["calibrated"]["confidence"][0] is None  # an empty bin
    assert sum(after["reliability"]["new"]["calibrated"]["counts"]) == 30
    mistakes = sum(found["confusions"]["images"])
    assert mistakes == round(60 * (1 - after["all"]["accuracy"]))
    assert found["notes"] == ["mind this"] and found["provenance"] == data.provenance


@pytest.mark.parametrize("name", ["notes.txt", "report.html", "report.json", "sub/report.md"])
def test_what_is_not_a_report_is_never_touched(make_data, tmp_path, name):
    file = tmp_path / "r" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"earlier report, came one with .*choose another"):
        write_report(make_data(), "Animals", tmp_path / "r")
    assert file.read_text() == "mine"
    assert [one for one in (tmp_path / "r").rglob("*") if one.is_file()] == [file]


def test_hidden_files_may_lie_beside_a_report(make_data, tmp_path):
    (tmp_path / ".DS_Store").write_text("mine")
    write_report(make_data(), "Animals", tmp_path)
    assert (tmp_path / ".DS_Store").read_text() == "mine"


def test_a_file_is_no_folder(make_data, tmp_path):
    (tmp_path / "r").write_text("mine")
    for folder in (tmp_path / "r", tmp_path / "r" / "inner"):
        with pytest.raises(ConfigError):
            check_folder(folder)


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_a_missing_package_is_said_before_anything_is_written(
    make_data, tmp_path, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"--report needs {name} .*; pip install '.\[plot\]'"):
        write_report(make_data(), "Animals", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_data_that_are_refused_leave_an_earlier_report_alone(make_data, tmp_path):
    data = make_data()
    write_report(data, "Animals", tmp_path)
    earlier = (tmp_path / "report.html").read_bytes()
    wrong = replace(data.main, tuned=np.full((60, 4), np.nan))
    with pytest.raises(DataError):
        write_report(replace(data, scores={"tuned": wrong}), "Animals", tmp_path)
    with pytest.raises(TypeError):
        write_report(replace(data, provenance={"when": object()}), "Animals", tmp_path)
    assert (tmp_path / "report.html").read_bytes() == earlier


EDGES = {
    "one image": {"images": 1},
    "one class": {"images": 5, "names": ("only",)},
    "two classes": {"names": ("a", "b")},
    "no zero-shot": {"zero_shot": False},
    "all right": {"strength": 60.0},
    "all wrong": {"strength": -60.0},
    "none tuned on": {"tuned": (False,) * 4},
    "a new class without images": {"images": 3, "tuned": (True, True, True, False)},
    "one new class": {"tuned": (True, True, True, False)},
    "1000 classes": {"images": 300, "names": tuple(f"kind {index}" for index in range(1000))},
    "long names": {"names": tuple(f"{'very ' * 60}{end}" for end in "abcd")},
    "other scripts": {"names": ("水族館の魚", "سمكة", "é\u0301", "😀")},
    "no pairs": {"pairs": []},
    "no provenance": {"provenance": {}},
}


@pytest.mark.parametrize("case", EDGES)
def test_any_data_make_a_report(make_data, tmp_path, case):
    data = make_data(**EDGES[case])
    write_report(data, "Animals", tmp_path / "r")
    found = loaded(tmp_path / "r")
    assert found["class_names"] == list(data.class_names)
    assert found["models"][-1]["all"]["n"] == len(data.files)
    html = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert all(name in html for name in data.class_names[: len(data.files)][:1])


def test_more_models_than_there_are_kinds_of_lines(make_data, tmp_path):
    data = make_data()
    more = {f"exported {index}": data.main for index in range(9)}
    write_report(replace(data, scores={**data.scores, **more}), "Animals", tmp_path / "r")
    assert len(loaded(tmp_path / "r")["models"]) == 11
