"""The plots are whole SVGs that need no colours."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from capt_deploy.metrics.reliability import reliability, risk_coverage
from capt_deploy.report import plots

pytest.importorskip("matplotlib")
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [one.text for one in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def some_answers(images=300, seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet([0.4] * 5, images), rng.integers(0, 5, images)


def draw_all():
    answers = some_answers()
    diagram = reliability(*answers)
    curves = {
        "zero-shot": risk_coverage(*answers),
        "$x_1$ <&>": risk_coverage(*some_answers(50, 1)),
    }
    return {
        "reliability": plots.draw_reliability(diagram, reliability(*some_answers(40))),
        "risks": plots.draw_risks(curves, {"zero-shot": 0.25, "$x_1$ <&>": 0.125}),
    }


def test_plots_name_what_they_show():
    drawn = draw_all()
    assert {"before", "after", "ideal", "confidence", "photos"} <= set(texts(drawn["reliability"]))
    assert {"0.250 zero-shot", "0.125 $x_1$ <&>"} <= set(texts(drawn["risks"]))


def test_plots_need_no_colours():
    for svg in draw_all().values():
        colours = set(re.findall(rb"#[0-9a-f]{6}", svg))
        assert all(colour[1:3] == colour[3:5] == colour[5:7] for colour in colours)


def test_plots_fetch_nothing():
    for svg in draw_all().values():
        for target in re.findall(rb'(?:href="|url\()([^")]*)', svg):
            assert target.startswith((b"#", b"data:"))


def test_the_same_data_give_the_same_picture_whatever_the_users_settings():
    import matplotlib

    first = draw_all()
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path"}):
        assert draw_all() == first


def test_bins_of_few_and_of_right_images_have_whiskers_too():
    probabilities = np.array([[0.9, 0.1]] * 50 + [[0.6, 0.4]] * 2)
    bins = reliability(probabilities, np.zeros(52, np.int64))
    assert b"nan" not in plots.draw_reliability(bins, bins)


def test_one_image_that_is_right_can_be_drawn():
    probabilities, labels = np.array([[1.0, 0.0]]), np.array([0])
    bins = reliability(probabilities, labels)
    assert texts(plots.draw_reliability(bins, bins))
    assert texts(plots.draw_risks({"tuned": risk_coverage(probabilities, labels)}, {"tuned": 0.0}))


def test_a_bin_with_few_images_gets_no_line(monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *a, **o: drawn.append((a, o)) or plot(self, *a, **o)
    )
    probabilities = np.array([[0.9, 0.1]] * 50 + [[0.6, 0.4]] * 9)
    bins = reliability(probabilities, np.zeros(59, np.int64))
    plots.draw_reliability(bins, bins)
    (many, few) = drawn[:2]
    assert many[0][0].tolist() == pytest.approx([0.9]) and many[1]["linestyle"] == "--"
    assert few[0][0].tolist() == pytest.approx([0.6]) and few[1]["linestyle"] == "none"
