"""What a report refuses, and which models it compares."""

from dataclasses import replace

import numpy as np
import pytest

from capt_deploy.core.errors import DataError
from capt_deploy.report.data import Answers, checked, printable


def with_logits(data, logits, **changes):
    return replace(data, models=[data.models[0], replace(data.models[1], logits=logits, **changes)])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused_with_their_number_and_model(make_data, value):
    data = make_data()
    logits = data.models[1].logits.copy()
    logits[[3, 7], 0] = value
    with pytest.raises(DataError, match=r"tuned: expected finite .* 2 of 60 images"):
        checked(with_logits(data, logits))


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan])
def test_a_temperature_is_positive(make_data, temperature):
    data = make_data()
    with pytest.raises(DataError, match="positive temperature"):
        checked(with_logits(data, data.models[1].logits, temperature=temperature))


def test_what_does_not_fit_together_is_refused(make_data):
    data = make_data()
    cut = data.models[1].logits[:, :3]
    wrong = {
        "as many files": replace(data, files=data.files[:5]),
        "at least one": replace(data, files=[], labels=np.zeros(0, np.int64)),
        "entries of `tuned`": replace(data, tuned=[True]),
        "labels and pairs": replace(data, pairs=[(0, 4)]),
        "different names": replace(data, models=[data.models[1]] * 2),
        "zero-shot first": replace(data, models=data.models[::-1]),
        "models of": replace(data, models=[]),
        "logits of shape": with_logits(data, cut),
        "4 factors": with_logits(data, data.models[1].logits, factors=np.ones(3)),
    }
    for message, one in wrong.items():
        with pytest.raises(ValueError, match=message):
            checked(one)
    with pytest.raises(ValueError, match="labels and pairs"):
        checked(replace(data, labels=data.labels - 1))


def test_all_models_are_compared_with_the_zero_shot_one(make_data):
    data = make_data()
    assert (data.zero_shot, data.main) == (data.models[0], data.models[1])
    alone = make_data(zero_shot=False)
    assert (alone.zero_shot, alone.main) == (None, alone.models[0])
    only = replace(data, models=data.models[:1])
    assert (only.zero_shot, only.main) == (None, data.models[0])


def test_names_become_what_any_file_can_hold(make_data):
    names = ("a\nb\tc", "\x00\x1b[31m", "\udcff\ufffe", "水\u200d族館 é")
    found = checked(make_data(names=names, title="one\u2028two"))
    assert found.class_names == ["a b c", "��[31m", "��", "水\u200d族館 é"]
    assert found.title == "one two"


@pytest.mark.parametrize("factor", [0.0, np.nan, np.inf])
def test_factors_are_positive(make_data, factor):
    data = make_data()
    factors = np.array([1, 1, 1, factor])
    with pytest.raises(DataError, match="tuned: expected factors"):
        checked(with_logits(data, data.models[1].logits, factors=factors))


def test_texts_of_the_provenance_can_be_written(make_data):
    data = make_data(provenance={"a\n": {"file\udcff": ("x\udcff", 1, None)}})
    assert checked(data).provenance == {"a ": {"file�": ["x�", 1, None]}}


def test_what_is_printable_stays():
    assert printable("<b> & سمكة 😀") == "<b> & سمكة 😀"


def test_arrays_are_not_compared():
    one = Answers("a", np.zeros((2, 2)), 1.0)
    assert one != Answers("a", np.zeros((2, 2)), 1.0)  # and raises nothing
