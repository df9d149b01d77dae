from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from capt_train.confusion.plot import plot_confusions

Counts = NDArray[np.float32]
LONG = "the black-throated warbler of the very far northern islands"


def some_counts(classes: int, seed: int = 0) -> Counts:
    counts = np.random.default_rng(seed).integers(0, 9, (classes, classes)).astype(np.float32)
    np.fill_diagonal(counts, 0)
    return counts


def twice(counts: NDArray[Any]) -> NDArray[Any]:
    return np.stack([counts, counts])


def some_names(classes: int) -> list[str]:
    return [f"{LONG if index % 3 == 0 else 'gull'} {index}" for index in range(classes)]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return the figures that are drawn during the test."""
    drawn: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            drawn.append(self)

    monkeypatch.setattr(matplotlib.figure, "Figure", Kept)
    return drawn


def panels(figure: Figure) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_xlabel() == "taken for"]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.mark.parametrize("classes", [3, 60])
def test_both_matrices_are_drawn_as_they_are_with_every_name_once(
    classes: int, figures: list[Figure], tmp_path: Path
) -> None:
    before, after = some_counts(classes), some_counts(classes, 1) / 2
    plot_confusions(tmp_path / "a.png", np.stack([before, after]), some_names(classes))
    left, right = panels(figures[0])
    assert np.array_equal(left.images[0].get_array(), before)
    assert np.array_equal(right.images[0].get_array(), after)
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, before.max())
    for axes in (left, right):
        names = [label.get_text() for label in axes.get_xticklabels()]
        assert len(set(names)) == classes
        assert list(axes.get_xticks()) == list(axes.get_yticks()) == list(range(classes))
        assert axes.get_ylim() == (classes - 0.5, -0.5)  # the first class is on top
    assert names == [label.get_text() for label in left.get_yticklabels()]
    assert not right.get_yticklabels()
    assert (left.get_ylabel(), right.get_ylabel()) == ("true class", "")
    assert f"before tuning: {before.sum():.0f} images" in texts(figures[0])
    Image.open(tmp_path / "a.png").verify()
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("classes", [2, 30])
def test_nothing_is_cut_at_the_edges_and_pictures_have_a_size_to_look_at(
    classes: int, tmp_path: Path
) -> None:
    plot_confusions(tmp_path / "a.png", twice(some_counts(classes)), [LONG] * classes)
    grey = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert min(grey.shape) > 400 and max(grey.shape) < 4000
    for edge in (grey[:3], grey[-3:], grey[:, :3], grey[:, -3:]):
        assert (edge == 255).all()


def test_numbers_stand_in_the_cells_of_few_classes(figures: list[Figure], tmp_path: Path) -> None:
    counts = np.array([[0, 7, 0], [0.25, 0, 0], [1234, 0, 0]])
    plot_confusions(tmp_path / "a.png", twice(counts), ["a", "b", "c"])
    panel = panels(figures[0])[0]
    cells = {text.get_position(): text.get_text() for text in panel.texts}
    assert cells == {(1, 0): "7", (0, 1): "0.2", (0, 2): "1234"}
    plot_confusions(tmp_path / "b.png", twice(some_counts(21)), some_names(21))
    assert not panels(figures[1])[0].texts


def test_with_many_classes_the_worst_pairs_are_ringed_and_listed(
    figures: list[Figure], tmp_path: Path
) -> None:
    before, after = np.zeros((2, 61, 61))
    before[3, 5], after[3, 5] = 9, 0.5
    after[60, 0] = 12  # only tuning brought it
    names = [f"n{index}" for index in range(61)]
    plot_confusions(tmp_path / "a.png", np.stack([before, after]), names)
    expected = "1  n60 taken for n0: 0 → 12\n2  n3 taken for n5: 9 → 0.5"
    assert expected in texts(figures[0])
    for panel in panels(figures[0]):
        assert [(text.get_text(), text.xy) for text in panel.texts] == [
            ("1", (0, 60)),
            ("2", (5, 3)),
        ]
        assert not list(panel.get_xticks())


def test_no_more_than_twelve_pairs_are_listed(figures: list[Figure], tmp_path: Path) -> None:
    plot_confusions(tmp_path / "a.png", twice(some_counts(80)), some_names(80))
    assert max(text.count("\n") for text in texts(figures[0])) == 11


def test_no_confusion_can_be_drawn(figures: list[Figure], tmp_path: Path) -> None:
    nothing = np.zeros((70, 70))
    plot_confusions(tmp_path / "a.png", twice(nothing), some_names(70))
    assert panels(figures[0])[0].images[0].get_clim() == (0, 1)


def test_names_are_no_markup_and_foreign_letters_do_not_warn(
    figures: list[Figure], tmp_path: Path
) -> None:
    names = ["$x_1$", "CO$_2 {", "東京", "two\nlines", LONG]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_confusions(tmp_path / "a.png", twice(some_counts(5)), names)
    panel = panels(figures[0])[0]
    labels = panel.get_xticklabels() + panel.get_yticklabels()
    assert not any(label.get_parse_math() for label in labels)
    drawn = [label.get_text() for label in labels]
    assert drawn[:4] == ["$x_1$", "CO$_2 {", "東京", "two lines"]
    assert drawn[4] == "the black-throat…orthern islands"


def test_darker_means_more_also_in_black_and_white(tmp_path: Path, figures: list[Figure]) -> None:
    plot_confusions(tmp_path / "a.png", twice(some_counts(3)), ["a", "b", "c"])
    image = panels(figures[0])[0].images[0]
    shades = image.to_rgba(np.linspace(0, image.get_clim()[1], 30))[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(shades) < 0).all()
    assert shades[0] > 0.95
    assert shades[1] < shades[0] - 0.1  # a single image is not lost among none


def test_pyplot_and_its_state_stay_untouched(tmp_path: Path) -> None:
    sys.modules.pop("matplotlib.pyplot", None)
    plot_confusions(tmp_path / "a.png", twice(some_counts(3)), ["a", "b", "c"])
    assert "matplotlib.pyplot" not in sys.modules


def test_the_same_counts_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_confusions(tmp_path / name, twice(some_counts(3)), ["a", "b", "c"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())).format == "PNG"


def test_the_picture_says_when_it_shows_only_the_most_confused_classes(
    figures: list[Figure], tmp_path: Path
) -> None:
    plot_confusions(tmp_path / "a.png", twice(some_counts(5)), some_names(5), 5)
    plot_confusions(tmp_path / "b.png", twice(some_counts(5)), some_names(5), 2000)
    assert "most confused" not in figures[0].get_suptitle()
    assert "The 5 most confused of 2,000 classes" in figures[1].get_suptitle()
