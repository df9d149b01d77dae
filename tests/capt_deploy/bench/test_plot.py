import pytest
from PIL import Image

from capt_deploy.bench.plot import plot_rows

pytest.importorskip("matplotlib")


def rows():
    return [
        {
            **{"backend": backend, "device": "cpu", "precision": "fp32", "batch": batch},
            **{"scope": scope, "p50_ms": 2.0 * batch, "p99_ms": 3.0 * batch},
            **{"throughput_per_s": 500.0, "concurrency": 1},
        }
        for backend in ("a", "b")
        for batch in (1, 8)
        for scope in ("host", "image_to_label")
    ]


def test_a_plot_has_panels_for_every_scope_and_bars_for_every_row(tmp_path, monkeypatch):
    from matplotlib import figure

    drawn = []

    class Kept(figure.Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            drawn.append(self)

    monkeypatch.setattr(figure, "Figure", Kept)
    path = tmp_path / "plot.png"
    plot_rows(path, [*rows(), {**rows()[0], "concurrency": 4}])
    (own,) = drawn
    assert len(own.axes) == 4
    assert [axes.get_title() for axes in own.axes[:2]] == ["scope host", "scope image_to_label"]
    assert [len(axes.patches) for axes in own.axes] == [0, 0, 5, 4]
    (legend,) = own.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "a, fp32, cpu",
        "b, fp32, cpu",
        "a, fp32, cpu, 4 callers",
    ]
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_nothing_is_told_apart_by_colour(tmp_path):
    path = tmp_path / "plot.png"
    plot_rows(path, rows())
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(1_000_000)
    assert all(max(colour) - min(colour) < 8 for count, colour in colours)  # all are greys


def test_a_series_may_lack_a_scope(tmp_path):
    plot_rows(tmp_path / "plot.png", [*rows(), {**rows()[0], "scope": "device", "backend": "c"}])
    assert (tmp_path / "plot.png").exists()


def test_rows_of_a_single_scope_and_batch_can_be_drawn(tmp_path):
    plot_rows(tmp_path / "plot.png", rows()[:1])
    assert (tmp_path / "plot.png").exists()
