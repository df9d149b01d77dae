"""Every family of models, small, tuned and loaded again, against open_clip itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from capt_deploy.data.preprocess import preprocess
from capt_train.clip.loading import load_backbone
from capt_train.method.prompt import PromptLearner
from capt_train.pipeline import train
from capt_train.run.folder import TunedModel, load_run
from capt_train.setting_groups import PromptSettings
from tests.configs import train_config
from tests.families import FAMILIES

NAMES = ["cat", "small grey dog", "x"]
BOTH = frozenset({"adapter", "sample-experts"})
VISUAL_PARTS = {
    "ViT-B-16": BOTH,
    "RN50": BOTH,
    "EVA02-B-16": frozenset({"adapter"}),
    "vit_medium_patch16_gap_256": frozenset({"adapter"}),
    "MobileCLIP-S1": BOTH,
    "MobileCLIP-B": BOTH,
    "MobileCLIP2-S0": BOTH,
    "ViT-B-16-SigLIP": frozenset({"adapter"}),
}


def opened(folder: Path) -> tuple[Any, Any, Any]:
    """Return model, transform and tokenizer as open_clip itself makes them."""
    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    return model.eval(), transform, open_clip.get_tokenizer(name)


def some_photos() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    shapes = [(20, 20, 3), (33, 17, 3), (16, 50, 3)]
    return [Image.fromarray(draw.integers(0, 256, s, dtype=np.uint8)) for s in shapes]


@pytest.fixture(scope="module")
def run_of(
    family_dir: Callable[[str], Path], photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TunedModel]:
    """Return a function that tunes a family for an epoch and loads what came out."""

    def run(name: str, **settings: Any) -> TunedModel:
        out = tmp_path_factory.mktemp("runs") / "run"
        few = {
            "shots": 3,
            "tuning_epochs": 1,
            "tuning_warmup_epochs": 0,
            "visual_epochs": 1,
            "visual_views": 2,
        }
        own = {"data": str(photos), "model": f"local-dir:{family_dir(name)}", "classes": "base"}
        train(train_config(**{**own, **few, "device": "cpu", **settings}), out)
        return load_run(out)

    return run


@pytest.mark.parametrize("name", FAMILIES)
def test_both_sides_say_what_open_clip_says(family_dir: Callable[[str], Path], name: str) -> None:
    model, transform, tokenizer = opened(family_dir(name))
    backbone = load_backbone(str(family_dir(name)), None, torch.device("cpu"))
    prompt = PromptLearner(backbone, NAMES, (0, 1), PromptSettings(depth=1))
    images = some_photos()
    pixels = torch.from_numpy(np.stack([preprocess(one, backbone.preprocess) for one in images]))
    with torch.no_grad():
        texts = model.encode_text(tokenizer([f"a photo of a {n}." for n in NAMES]), normalize=True)
        torch.testing.assert_close(prompt(range(3)), texts, rtol=0, atol=1e-6)
        found = model.encode_image(torch.stack([transform(one) for one in images]), normalize=True)
        torch.testing.assert_close(backbone.image_embeddings(pixels), found, rtol=0, atol=1e-5)
        logits, _ = model.get_logits(backbone.normalise(pixels), tokenizer(["a cat."]))
    own = backbone.scale * found @ backbone.text_embeddings(["a cat."]).T + backbone.logit_bias
    torch.testing.assert_close(own, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tuned_text_side_says_what_open_clip_says_with_its_vectors(
    run_of: Callable[..., TunedModel], family_dir: Callable[[str], Path], name: str
) -> None:
    tuned = run_of(name, method="coop")
    model, _, tokenizer = opened(family_dir(name))
    (context,) = (own.context for own in tuned.learner.prompts)
    first = 0 if name == "ViT-B-16-SigLIP" else 1

    def replace(_: Any, __: Any, vectors: Tensor) -> Tensor:
        return torch.cat(
            [vectors[:, :first], context.expand(4, -1, -1), vectors[:, first + 4 :]], 1
        )

    words = tokenizer([f"a photo of a {own}." for own in tuned.class_names])
    pixels = torch.randint(0, 256, (5, *tuned.backbone.preprocess.size, 3), dtype=torch.uint8)
    with torch.no_grad():
        images = tuned.backbone.normalise(pixels)
        before, _ = model.get_logits(images, words)
        getattr(model, "text", model).token_embedding.register_forward_hook(replace)
        after, _ = model.get_logits(images, words)
    embeddings = tuned.learner.image_embeddings(pixels)
    fitted = tuned.fitted
    found = tuned.zero_shot_logits(embeddings) * fitted.zero_shot_temperature
    torch.testing.assert_close(found, before, rtol=0, atol=2e-4)
    found = tuned.logits(embeddings) * fitted.temperature
    torch.testing.assert_close(found, after, rtol=0, atol=2e-4)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_tunes_what_a_family_can_have_and_says_what_not(
    run_of: Callable[..., TunedModel], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = run_of(name, added=tuple(sorted(BOTH)), visual_strength="1")
    notes = [line for line in capsys.readouterr().err.splitlines() if "left out: " in line]
    missing = sorted(BOTH - VISUAL_PARTS[name])
    assert [note.partition("left out: ")[2] for note in notes] == (
        [", ".join(missing)] if missing else []
    )
    assert tuned.learner.parts(tuned.config) & BOTH == VISUAL_PARTS[name]
    pixels = torch.randint(0, 256, (5, *tuned.backbone.preprocess.size, 3), dtype=torch.uint8)
    logits = tuned.logits(tuned.learner.image_embeddings(pixels))
    assert logits.shape == (5, 4)
    assert logits.isfinite().all()


def test_every_part_of_the_text_side_works_with_siglip(run_of: Callable[..., TunedModel]) -> None:
    parts = ("text-prompts", "mixture", "tcpt", "coa")
    tuned = run_of("ViT-B-16-SigLIP", method="coop", added=parts, prompt_count=2, prompt_depth=2)
    assert tuned.learner.parts(tuned.config) == tuned.config.parts
    for prompt in tuned.learner.prompts:
        assert prompt.deeper is not None
        assert prompt.deeper.shape == (1, 4, 32)
    assert sum(tuned.fitted.mixture.inside) == pytest.approx(1)
    assert tuned.logits(normalize(torch.randn(2, 32), dim=1)).isfinite().all()
