from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks import colours
from benchmarks.record import load_cells


def test_the_discriminant_is_that_of_the_paper() -> None:
    draw = np.random.default_rng(0)
    labels = np.arange(60) % 3
    points = draw.normal(size=(60, 5)) + 2 * np.eye(5)[labels]
    means = [points[labels == label].mean(axis=0) for label in range(3)]
    centred = points - np.array(means)[labels]
    covariance = centred.T @ centred / 59
    inverse = 5 * np.linalg.inv(59 * covariance + np.trace(covariance) * np.eye(5))
    rows, biases = colours.discriminant(
        torch.from_numpy(points).float(), torch.from_numpy(labels), 3
    )
    np.testing.assert_allclose(rows, means @ inverse, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(biases, [-m @ inverse @ m / 2 for m in means], rtol=1e-4)


def test_the_docs_show_every_measured_cell() -> None:
    cells = load_cells("cameras")
    table = colours.markdown(cells)
    assert table in (Path(__file__).parents[2] / "docs" / "ablation.md").read_text()
    assert len(table.splitlines()) == 2 + len(cells)
