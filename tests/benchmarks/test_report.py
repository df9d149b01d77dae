"""The benchmark measures what `capt-eval --report` writes."""

import numpy as np
import pytest

from benchmarks.report import measure, synthetic

pytest.importorskip("matplotlib")


def test_every_file_is_measured():
    found = measure(synthetic(80, 4))
    assert set(found["bytes"]) == {"report.html", "report.json", "report.md"}
    assert min(found["bytes"].values()) > 1000
    assert (found["images"], found["classes"], found["models"]) == (80, 4, 5)


def test_the_data_are_the_same_each_time():
    one, other = synthetic(20, 4), synthetic(20, 4)
    assert np.array_equal(one.models[3].logits, other.models[3].logits)
    right = np.mean(synthetic(4000, 100).main.logits.argmax(axis=1) == synthetic(4000, 100).labels)
    assert 0.3 < right < 0.8  # there are recovered, wrong and broken images to show
