"""The trial with backends that take as long as they are told, and answer as the trained model."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from capt_deploy.backends.base import Outputs
from capt_deploy.backends.onnxruntime import OnnxRuntime
from capt_deploy.backends.options import DEFAULT_OPTIONS, RuntimeOptions
from capt_deploy.backends.spec import ONNXRUNTIME_CPU
from capt_deploy.bundle.read import open_bundle
from capt_deploy.core.errors import BackendError
from capt_deploy.serving import trial
from capt_deploy.serving.trial import Candidate, fastest
from capt_deploy.verify.reference import ReferenceOutputs, draw_patterns

GOLDEN = Path(__file__).parents[2] / "golden" / "tiny.capt"
PATTERNS = draw_patterns(open_bundle(GOLDEN).manifest.preprocess.size)
ANSWERS = OnnxRuntime((GOLDEN / "model.onnx").read_bytes(), "fp32").run(PATTERNS)


class Fake:
    def __init__(self, seconds: float, wrong: bool) -> None:
        self.seconds, self.wrong, self.closed, self.runs = seconds, wrong, False, 0

    def run(self, images):
        time.sleep(self.seconds)
        self.runs += 1
        rows = [int(np.flatnonzero((image == PATTERNS).all(axis=(1, 2, 3)))[0]) for image in images]
        outputs = Outputs(*(part[rows] for part in ANSWERS))
        return Outputs(outputs.logits[:, ::-1], *outputs[1:]) if self.wrong else outputs

    def close(self):
        self.closed = True


class Machine:
    """Opens fakes, and remembers which."""

    def __init__(self, bundle, seconds, wrong=(), broken=()):
        self.bundle, self.seconds, self.wrong, self.broken = bundle, seconds, wrong, list(broken)
        self.closed_for_good: list[str] = []
        self.opened: dict[str, Fake] = {}

    @property
    def candidates(self):
        return [Candidate(replace(ONNXRUNTIME_CPU, name=name), "fp32") for name in self.seconds]

    def open(self, candidate):
        name = candidate.spec.name
        if name in self.closed_for_good:
            raise BackendError("no more")
        if name in self.broken:
            raise RuntimeError("it does not load")
        fake = self.opened[name] = Fake(self.seconds[name], name in self.wrong)
        return fake

    def choose(self, options=DEFAULT_OPTIONS, *, check=True):
        self.opened.clear()
        candidates = self.candidates
        backend, chosen = fastest(self.bundle, candidates, options, self.open, check=check)
        name = next(name for name, fake in self.opened.items() if fake is backend)
        assert str(chosen) == f"{name} fp32"
        return name


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "_SECONDS", 0.05)
    return tmp_path / "cache" / "trials"


@pytest.fixture
def machine(empty_cache, with_reference):
    """Return a function that makes a machine for a bundle that holds the reference."""
    reference = ReferenceOutputs(
        (), np.empty(0, np.int64), Outputs(*(a[:0] for a in ANSWERS)), ANSWERS
    )
    return partial(Machine, open_bundle(with_reference(reference.save())))


def test_the_fastest_is_taken_and_the_others_are_closed(machine):
    made = machine({"slow": 0.03, "fast": 0.001, "middle": 0.01})
    assert made.choose() == "fast"
    assert {name: fake.closed for name, fake in made.opened.items()} == {
        "slow": True,
        "fast": False,
        "middle": True,
    }


def test_it_is_measured_once(machine, empty_cache, caplog):
    made = machine({"slow": 0.03, "fast": 0.001})
    with caplog.at_level("INFO"):
        assert made.choose() == "fast"
        assert "fastest for one image: fast fp32" in caplog.text
        caplog.clear()
        assert made.choose() == "fast"
    assert not caplog.text and made.opened.keys() == {"fast"}
    assert made.opened["fast"].runs == 0
    (file,) = empty_cache.iterdir()
    assert json.loads(file.read_text())["seconds"].keys() == {"slow fp32", "fast fp32"}


def test_other_options_are_measured_again(machine):
    made = machine({"slow": 0.03, "fast": 0.001})
    made.choose()
    made.choose(RuntimeOptions(threads=3))
    assert made.opened.keys() == {"slow", "fast"}
    made.choose(RuntimeOptions(batches=(2, 8, 32)))
    assert made.opened.keys() == {"slow", "fast"}


def test_one_that_differs_from_the_trained_model_is_not_taken(machine, caplog):
    made = machine({"slow": 0.01, "fast": 0.001}, wrong=["fast"])
    assert made.choose() == "slow" and made.opened["fast"].closed
    assert "fast fp32 is not used: differs from the trained model: top1 agreement" in caplog.text


def test_where_the_caller_has_named_the_precision_answers_are_not_compared(machine):
    assert machine({"slow": 0.01, "fast": 0.001}, wrong=["fast"]).choose(check=False) == "fast"


def test_a_single_one_is_opened_and_not_measured(machine):
    made = machine({"only": 0.01}, wrong=["only"])
    assert made.choose() == "only" and made.opened["only"].runs == 0


def test_a_hopeless_one_is_given_up_at_once(machine):
    made = machine({"fast": 0.001, "slow": 0.1})
    assert made.choose() == "fast"
    assert made.opened["slow"].runs == 4  # one that is not timed, and three


def test_a_tie_goes_to_the_first_which_is_the_more_exact(machine):
    made = machine({"exact": 0.02, "rough": 0.0199})
    assert made.choose() == "exact"


def test_one_that_does_not_load_is_a_warning_and_not_the_end(machine, caplog):
    made = machine({"gone": 0.001, "slow": 0.01, "fast": 0.001}, broken=["gone"])
    assert made.choose() == "fast"
    assert "gone fp32 is not used: it does not load" in caplog.text


def test_where_none_works_all_reasons_are_named(machine):
    made = machine({"one": 0.01, "two": 0.01}, broken=["one", "two"])
    with pytest.raises(BackendError, match="one fp32: it does not load; two fp32: it does not"):
        made.choose()


def test_where_all_differ_the_fastest_is_used_with_a_warning(machine, caplog):
    made = machine(
        {"gone": 0.001, "slow": 0.01, "fast": 0.001}, broken=["gone"], wrong=["slow", "fast"]
    )
    assert made.choose() == "fast"
    assert "none gives the trained model's answers" in caplog.text
    caplog.clear()
    assert made.choose() == "fast"
    assert made.opened["fast"].runs == 0  # not measured again, and still said
    assert "none gives the trained model's answers" in caplog.text


def test_what_worked_once_and_fails_now_is_measured_anew(machine):
    made = machine({"slow": 0.03, "fast": 0.001})
    made.choose()
    made.closed_for_good.append("fast")
    assert made.choose() == "slow"


@pytest.mark.parametrize("content", ["", "[]", '{"chosen": 3}', '{"chosen": "gone fp32"}', "{"])
def test_a_damaged_memory_costs_time_and_nothing_else(machine, empty_cache, content):
    made = machine({"slow": 0.03, "fast": 0.001})
    made.choose()
    (file,) = empty_cache.iterdir()
    file.write_text(content)
    assert made.choose() == "fast" and made.opened.keys() == {"slow", "fast"}


def test_without_a_cache_it_is_measured_each_time(machine, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CAPT_CACHE", str(tmp_path / "file"))
    made = machine({"slow": 0.03, "fast": 0.001})
    assert made.choose() == made.choose() == "fast"
    assert made.opened.keys() == {"slow", "fast"}
