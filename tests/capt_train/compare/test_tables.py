"""Tables of a comparison, from cells made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel

from capt_train.compare.plan import Plan, read_plan
from capt_train.compare.tables import Table, paired_p, tables, to_html, to_latex, to_markdown

ACCURACY = {"CoOp": (0.50, 0.54, 0.52), "CLAP": (0.60, 0.62, 0.64)}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    content = {
        "model": "x",
        "data": {"pets": "a", "cars": {"path": "b", "classes": "base"}},
        "methods": [{"name": "CoOp", "method": "coop"}, {"name": "CLAP", "method": "clap"}],
        "shots": [4],
        "seeds": [1, 2, 3],
        "calibrations": ["none"],
        "reference": "CoOp",
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    return read_plan(tmp_path / "x.json")


def cell(data: str, row: str, seed: int) -> dict[str, Any]:
    value = ACCURACY[row][seed - 1]
    parts = {"base": None, "new": None, "harmonic": None, "all": value}
    errors = {"base": None, "new": None, "all": 0.1}
    if data == "cars":
        parts = {"base": value + 0.1, "new": value - 0.1, "harmonic": value, "all": 0.4}
        errors = {"base": 0.02, "new": 0.06, "all": 0.5}
    names = {"data": data, "row": row, "shots": 4, "seed": seed, "ece": {"none": errors}}
    return {**names, **parts, "targets": {}, "transductive": int(row == "CLAP")}


@pytest.fixture
def found(plan: Plan) -> list[Table]:
    cells = {c.key: cell(c.data, c.row, c.config.seed) for c in plan.cells}
    return tables(plan, cells)


def test_the_mean_of_data_sets_is_tested_against_the_reference(found: list[Table]) -> None:
    average = found[0]
    assert average.title == "Mean of the data sets, 4 shots"
    assert average.header == ("", "accuracy", "ECE none", "data sets", "difference from CoOp", "p")
    assert average.rows == (
        ("CoOp", "52.0", "7.0", "2", "–", "–"),
        ("CLAP †", "62.0", "7.0", "2", "+10.0", "–"),  # two data sets are too few for a test
    )
    assert "transductive" in average.note


def test_a_data_set_shows_the_spread_of_its_seeds(found: list[Table]) -> None:
    pets, cars = found[1:]
    assert pets.header == ("", "all", "ECE none, all")
    assert pets.rows[0] == ("CoOp", "52.0 ± 2.0", "10.0 ± 0.0")
    assert cars.header[1:5] == ("tuned", "new", "harmonic", "all")
    assert cars.rows[1][0] == "CLAP †" and "transductive" in cars.note
    assert cars.rows[0][1:4] == ("62.0 ± 2.0", "42.0 ± 2.0", "52.0 ± 2.0")


def test_p_is_that_of_a_paired_test() -> None:
    pairs = [*zip(ACCURACY["CLAP"], ACCURACY["CoOp"], strict=True)]
    expected = ttest_rel(ACCURACY["CLAP"], ACCURACY["CoOp"]).pvalue
    assert paired_p(pairs) == pytest.approx(expected)


def test_too_few_pairs_have_no_p() -> None:
    assert paired_p([(1.0, 0.5), (2.0, 1.0)]) is None
    assert paired_p([(1.0, 0.5)] * 3) is None


def test_every_form_holds_every_cell(found: list[Table]) -> None:
    markdown, page, latex = to_markdown(found), to_html(found, ["a.png"]), to_latex(found)
    assert "| CoOp | 52.0 ± 2.0 | 10.0 ± 0.0 |" in markdown
    assert "<td>52.0 ± 2.0</td>" in page and '<img src="a.png"' in page
    assert r"CoOp & 52.0 $\pm$ 2.0 & 10.0 $\pm$ 0.0 \\" in latex
    assert r"$\dagger$ transductive" in latex
    strange = Table("a_b <x>", ("", "50 % & more"), (("<b>", "1"),))
    assert "&lt;b&gt;" in to_html([strange])
    assert r"50 \% \& more" in to_latex([strange]) and r"a\_b" in to_latex([strange])
