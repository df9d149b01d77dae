"""What all tests share: shape checks, a private cache, a tiny random CLIP, a few small photos."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from capt_deploy.core.console import logger, messages_on_stderr

if TYPE_CHECKING:
    from capt_train.clip.backbone import Backbone

# tests/capt_deploy also runs where the training stack is not installed.
if all(find_spec(name) for name in ("torch", "jaxtyping", "beartype")):
    from jaxtyping import install_import_hook

    install_import_hook(["capt_train", "export"], "beartype.beartype")

# Shells start background jobs with SIGINT ignored, and children inherit that: tests that press
# Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_CLIP: Mapping[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 16,
        "patch_size": 8,
        "width": 32,
        "layers": 2,
        "head_width": 16,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}
COLOURS = {
    "blue_sky": (60, 110, 200),
    "green_leaf": (60, 150, 60),
    "grey_stone": (120, 120, 120),
    "red_ball": (200, 50, 50),
}
PER_CLASS = {"train": 6, "val": 4, "test": 5}


def write_tiny_model(
    folder: Path, seed: int = 0, preprocess: Mapping[str, Any] | None = None, **changes: Any
) -> Path:
    """Write a seeded random open_clip model as a `local-dir`; return the folder.

    Further keywords change TINY_CLIP: dictionaries are merged, other values replaced. Where the
    text side names a Hugging Face tokenizer, one like SigLIP's lies in the folder.
    """
    import open_clip
    import torch
    from safetensors.torch import save_file

    model = json.loads(json.dumps(TINY_CLIP))
    for name, value in changes.items():
        model[name] = {**model.get(name, {}), **value} if isinstance(value, dict) else value
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": model, "preprocess_cfg": dict(preprocess or {})}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if "hf_tokenizer_name" in model["text_cfg"]:
        from benchmarks.random_models import write_tokenizer

        write_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def write_photos(root: Path) -> Path:
    """Write a data set of 20x20 PNGs: four classes of one colour each, under much noise."""
    random = np.random.default_rng(0)
    for split, count in PER_CLASS.items():
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.normal(colour, 70, size=(20, 20, 3)).clip(0, 255)
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(autouse=True)
def _messages() -> Iterator[None]:
    """Print what commands would print, also where a test calls a library function."""
    with messages_on_stderr():
        logger.propagate = True  # to pytest's caplog
        yield


@pytest.fixture(scope="session", autouse=True)
def _private_cache() -> Iterator[None]:
    """Keep embeddings and engines of tests away from the person's own."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("CAPT_CACHE")
        os.environ["CAPT_CACHE"] = folder
        yield
        os.environ.pop("CAPT_CACHE")
        if before is not None:
            os.environ["CAPT_CACHE"] = before


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `write_tiny_model` with a new folder for every call."""
    return lambda **options: write_tiny_model(tmp_path_factory.mktemp("model"), **options)


@pytest.fixture(scope="session")
def tiny_model_dir(write_model: Callable[..., Path]) -> Path:
    """Return the `local-dir` of a random CLIP: 16 px, 32 dimensions, 2 layers a tower."""
    return write_model()


@pytest.fixture(scope="session")
def tiny_backbone(tiny_model_dir: Path) -> Backbone:
    """Return that CLIP as a backbone on the CPU."""
    import torch

    from capt_train.clip.loading import load_backbone

    return load_backbone(f"local-dir:{tiny_model_dir}", None, torch.device("cpu"))


@pytest.fixture(scope="session")
def family_dir(write_model: Callable[..., Path]) -> Callable[[str], Path]:
    """Return a function that writes the small version of a family, once; see tests/families.py."""
    from tests.families import family

    return cache(lambda name: write_model(**family(name)))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the data set of `write_photos`."""
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def tuned_run(tiny_model_dir: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with all parts but visual prompts: two of four classes, four shots.

    The visual side learns fast, so that what an export leaves out would show.
    """
    from capt_train.pipeline import train
    from tests.configs import changed, train_config

    run = tmp_path_factory.mktemp("runs") / "run"
    model = f"local-dir:{tiny_model_dir}"
    few = {
        "shots": 4,
        "tuning_epochs": 5,
        "visual_epochs": 3,
        "prompt_depth": 2,
    }
    few |= {"map_side": "classes", "map_ridge": 0.003, "rows_weight": 0.2}  # nothing is chosen
    config = train_config(data=str(photos), model=model, method="full", classes="base", **few)
    fast = changed(
        config, visual_learning_rate=0.02, visual_adapter_exponent=1.0, visual_strength="0.75"
    )
    train(replace(fast, without=("visual-prompts",)), run)
    return run


@pytest.fixture(scope="session")
def bundle(tuned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of that run."""
    from export.writer import export_run

    return export_run(tuned_run, tmp_path_factory.mktemp("bundles") / "tiny.capt")


@pytest.fixture(scope="session")
def full_bundle(tuned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of that run with a graph in each precision."""
    from export.writer import ExportOptions, export_run

    options = ExportOptions(precisions=("fp32", "fp16", "bf16", "int8"))
    return export_run(tuned_run, tmp_path_factory.mktemp("bundles") / "full.capt", options=options)


@pytest.fixture(scope="session")
def decided_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the committed bundle with scores of 200 made-up validation images.

    Its own comes from a run that kept none.
    """
    from safetensors.numpy import save

    from capt_deploy.bundle.read import CALIBRATION, MANIFEST
    from capt_deploy.confidence.decisions import Decisions
    from capt_deploy.metrics.calibration import softmax

    bundle = tmp_path_factory.mktemp("decided") / "decided.capt"
    shutil.copytree(Path(__file__).parent / "golden" / "tiny.capt", bundle)
    random = np.random.default_rng(0)
    logits = 3 * random.normal(size=(200, 4))
    probabilities = softmax(logits).astype(np.float32)
    draws = random.random((200, 1))  # labels are drawn from the probabilities, which so are right
    labels = (probabilities.cumsum(axis=1) < draws).sum(axis=1).clip(max=3)
    content = save(Decisions.from_validation(probabilities, logits, labels).arrays())
    (bundle / CALIBRATION).write_bytes(content)
    manifest = json.loads((bundle / MANIFEST).read_text())
    record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest["files"][CALIBRATION] = record
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    return bundle


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real data and models beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"the shared data is not there ({folder})")
    return folder
