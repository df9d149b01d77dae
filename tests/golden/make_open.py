"""Make the golden open bundle: `python -m tests.golden.make_open` from the repository's root.

It is the bundle of a small SigLIP, whose vocabulary is small enough to be committed, with its text
side. `open.json` holds what torch said of the golden photos with classes that are added to it.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch

from capt_deploy.data.preprocess import preprocess
from capt_train.pipeline import train
from capt_train.run.folder import load_run
from export.source.classes import with_classes
from export.source.model import Source, source_from_run
from export.text.graph import write_open_vocabulary
from export.writer import ExportOptions, export
from tests.configs import train_config
from tests.conftest import write_photos, write_tiny_model
from tests.export.conftest import TRAINED, shaken
from tests.families import family

FOLDER = Path(__file__).parent
BUNDLE, PHOTOS, EXPECTED = FOLDER / "open.capt", FOLDER / "photos", FOLDER / "open.json"
ADDED = ("white dog", "a small boat")


def main() -> None:
    """Replace bundle and expectations; the photos are those of `make`."""
    shutil.rmtree(BUNDLE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        model = write_tiny_model(temporary / "siglip", **family("ViT-B-16-SigLIP"))
        photos = write_photos(temporary / "photos")
        config = train_config(
            data=str(photos),
            model=f"local-dir:{model}",
            method="full",
            without=("colours", "visual"),
            classes="base",
            **{**TRAINED, "prompt_count": 1},
        )
        train(config, temporary / "run")
        run = shaken(load_run(temporary / "run"))
        source = source_from_run(run)
        names = source.class_names
        export(source, BUNDLE, ExportOptions(), lambda f: write_open_vocabulary([run], f, names))
        _write_expectations(with_classes(source, [run], [*source.class_names, *ADDED]))


@torch.no_grad()
def _write_expectations(source: Source) -> None:
    expected = {}
    for photo in sorted(PHOTOS.rglob("*.png")):
        pixels = preprocess(photo, source.learner.backbone.preprocess)
        embedding = source.learner.image_embeddings(torch.from_numpy(pixels.copy())[None])
        logits = embedding @ source.head.weight.T + source.head.bias
        expected[photo.relative_to(PHOTOS).as_posix()] = logits[0].tolist()
    content = {"class_names": source.class_names, "tuned": source.tuned, "logits": expected}
    EXPECTED.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
