"""A thousand classes from photos to a report: nothing grows with the square of their number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

CLASSES = 1000
SHOWN = {"train": CLASSES, "val": 150, "test": 250}  # classes that have a photo in each split


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of many classes, whose photos are four coloured squares."""
    root = tmp_path_factory.mktemp("many")
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        colours = random.integers(0, 256, (2, 2, 3)).repeat(8, axis=0).repeat(8, axis=1)
        for split in (split for split, count in SHOWN.items() if label < count):
            folder = root / split / f"thing {label}"
            folder.mkdir(parents=True)
            pixels = random.normal(colours, 40).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "0.png", compress_level=1)
    return root


def test_a_thousand_classes_are_tuned_exported_and_reported(
    photos: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    from capt_deploy.cli.predict import main as predict
    from capt_train.cli.train import main as train
    from export.cli.eval import main as evaluate
    from export.cli.export import main as export

    def run(command: object, *arguments: object) -> str:
        done = CliRunner().invoke(command, [*map(str, arguments)])  # type: ignore[arg-type]
        assert done.exit_code == 0, done.output
        return done.stdout

    tuned, bundle, report = tmp_path / "run", tmp_path / "many.capt", tmp_path / "report"
    data = ("--data", photos)
    fixed = ("--set", "rows.weight=1", "--set", "calibration.calibrator=temperature")
    model = ("--model", tiny_model_dir, "--method", "rows")
    run(train, *data, *model, *fixed, "--set", "workers=1", "--out", tuned)
    assert not (tuned / "bank.safetensors").exists()  # which no part reads
    run(export, tuned, "--out", bundle)
    (answer,) = json.loads(run(predict, bundle, photos / "test" / "thing 7", "--json"))
    assert len(answer["top_k"]) == 5
    figures = json.loads(run(evaluate, bundle, *data, "--report", report, "--json"))
    assert figures["all"]["n"] == SHOWN["test"]
    assert figures["all"]["accuracy"] > 20 / CLASSES
    page = (report / "report.html").read_text(encoding="utf-8")
    assert len(page) < 1_000_000
    assert "most confused of 1000 classes" in page
