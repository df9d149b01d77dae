"""What a report refuses, and which models it compares."""

from dataclasses import replace

import numpy as np
import pytest

from capt_deploy.core.errors import DataError
from capt_deploy.report.results import find_results


def with_scores(data, **changes):
    return replace(data, scores={"tuned": replace(data.main, **changes)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused_with_their_number_and_model(make_data, value):
    data = make_data()
    for model, field in (("tuned", "tuned"), ("zero-shot", "zero_shot")):
        logits = getattr(data.main, field).copy()
        logits[[3, 7], 0] = value
        with pytest.raises(DataError, match=rf"{model}: expected finite .* 2 of 60 images"):
            find_results(with_scores(data, **{field: logits}), "")


def test_all_models_are_compared_with_the_zero_shot_one(make_data):
    data = make_data()
    results = find_results(data, "")
    assert (results.zero_shot.name, results.main.name) == ("zero-shot", "tuned")
    other = replace(data.main, zero_shot=None)  # its own bundle does not know the frozen model
    both = find_results(replace(data, scores={"tuned": data.main, "exported fp32": other}), "")
    *_, exported = both.models
    assert exported.report["zero_shot"] == results.main.report["zero_shot"]
    alone = find_results(make_data(zero_shot=False), "")
    assert (alone.zero_shot, alone.main.name) == (None, "tuned")


def test_names_become_what_any_file_can_hold(make_data):
    names = ("a\nb\tc", "\x00\x1b[31m", "\udcff\ufffe", "水\u200d族館 é")
    found = find_results(make_data(names=names), "one\u2028two")
    assert found.evaluation.class_names == ["a b c", "��[31m", "��", "水\u200d族館 é"]
    assert found.title == "one two"


def test_texts_of_the_provenance_can_be_written(make_data):
    data = make_data(provenance={"a\n": {"file\udcff": ("x\udcff", 1, None)}})
    found = find_results(data, "").evaluation.provenance
    assert found == {"a ": {"file�": ["x�", 1, None]}}
