"""Make the golden bundle: `python -m tests.golden.make` from the repository's root.

It is committed so that the runtime can be tested where no torch is installed, and so that a
change of the format that would break people's old bundles does not go unnoticed. `expected.json`
holds what torch said about its photos. Make it anew only together with a new schema version.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from capt_deploy.data.preprocess import preprocess
from capt_train.pipeline import train
from capt_train.run.folder import load_run
from export.writer import export_run
from tests.configs import train_config
from tests.conftest import COLOURS, write_photos, write_tiny_model

FOLDER = Path(__file__).parent
BUNDLE, PHOTOS = FOLDER / "tiny.capt", FOLDER / "photos"


def main() -> None:
    """Replace bundle, photos and expectations."""
    for old in (BUNDLE, PHOTOS):
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        model = write_tiny_model(temporary / "tiny")
        photos = write_photos(temporary / "photos")
        config = train_config(
            data=str(photos), model=f"local-dir:{model}", classes="base", shots=4, tuning_epochs=5
        )
        train(config, temporary / "run")
        export_run(temporary / "run", BUNDLE)
        _write_photos()
        _write_expectations(temporary / "run")


def _write_photos() -> None:
    random = np.random.default_rng(7)
    sizes = {"blue_sky": (16, 16), "green_leaf": (37, 21), "grey_stone": (20, 64)}
    for name, (width, height) in sizes.items():
        folder = PHOTOS / "test" / name
        folder.mkdir(parents=True)
        pixels = random.normal(COLOURS[name], 40, size=(height, width, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "0.png")


def _write_expectations(run: Path) -> None:
    model = load_run(run)
    expected = {}
    for photo in sorted(PHOTOS.rglob("*.png")):
        pixels = torch.from_numpy(preprocess(photo, model.backbone.preprocess).copy()[None])
        logits = model.logits(model.backbone.image_embeddings(pixels))
        expected[photo.relative_to(PHOTOS).as_posix()] = logits.softmax(dim=1)[0].tolist()
    text = json.dumps({"class_names": model.class_names, "probabilities": expected}, indent=1)
    (FOLDER / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
