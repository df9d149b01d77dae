"""Test which parts of the method each family of models supports, at its real size.

    python -m benchmarks.families --docs

Architectures are open_clip's, with random weights: nothing is fetched. Every part is put in by the
functions that `capt-train` and `capt-export` use, and run forwards and backwards once. Rows stay in
benchmarks/results/families.json. One model at a time is in memory; the largest takes about 5 GB.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.random_models import random_backbone
from benchmarks.record import add_cells, load_cells, write_docs
from capt_deploy.core.console import Command, say
from capt_deploy.core.errors import ModelError
from capt_train.clip.backbone import Backbone
from capt_train.clip.colour_map import ColourMap
from capt_train.clip.text_tokens import whole_words
from capt_train.config import TrainConfig
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.learner import Learner, left_out, make_learner
from capt_train.method.mixture import pseudo_class_names
from capt_train.method.prompt import PromptLearner
from capt_train.parts import SENTENCE_KINDS
from capt_train.setting_groups import PromptSettings
from export.graph.visual import VisualClassifier
from export.source.fold import FoldedHead

MODELS = (
    *("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "EVA02-B-16"),
    *("vit_medium_patch16_gap_256", "MobileCLIP-S1", "MobileCLIP-B", "MobileCLIP2-S0"),
    *("ViT-B-16-SigLIP", "RN50"),
)
# Keys of a row that say whether a part is possible, in the order of the columns.
PARTS = (
    *("prompt", "text-prompts", "mixture", "semantic-experts", "colours"),
    *("adapter", "sample-experts", "visual-prompts", "lora", "layer-norm"),
)
_TITLES = {"text-prompts": "deep text prompts, blocks", "normalisation": "normalisation, exported"}
DOCS = Path(__file__).parents[1] / "docs" / "families.md"
_NAMES = ("cat", "grey dog")


@click.command(cls=Command)
@click.option("--models", default=",".join(MODELS), help="Names of open_clip's; by default all.")
@click.option("--only-table", is_flag=True, help="Test nothing.")
@click.option("--docs", is_flag=True, help="Write the table into docs/families.md as well.")
def main(models: str, only_table: bool, docs: bool) -> None:
    """Test each model, one after the other, and print the table."""
    rows = load()
    for name in () if only_table else models.split(","):
        say(name)
        rows[name] = support(random_backbone(name))
        gc.collect()
        add_cells("families", {name: rows[name]})
    table = markdown(rows)
    click.echo(table)
    if docs:
        write_docs(DOCS, "families", table)


def load() -> dict[str, dict[str, Any]]:
    """Return the measured rows, by model."""
    return load_cells("families")


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table, and under it the messages of capt-train about parts that it leaves out."""
    keys = (*PARTS, "normalisation")
    lines = [
        "| | pixels | parameters | " + " | ".join(_TITLES.get(key, key) for key in keys) + " |",
        "|---" * (len(keys) + 3) + "|",
    ]
    ordered = [(name, rows[name]) for name in sorted(rows, key=_place)]
    for name, row in ordered:
        size = f"{row['pixels']} | {row['parameters'] / 1e6:.0f} M"
        cells = " | ".join(_cell(row[key]) for key in keys)
        lines.append(f"| {name} | {size} | {cells} |")
    notes = [f"- {name}: {note}" for name, row in ordered for note in row["notes"]]
    return "\n".join([*lines, "", *notes])


def _place(name: str) -> int:
    return MODELS.index(name) if name in MODELS else len(MODELS)


def _cell(value: Any) -> str:
    return {True: "yes", False: "-"}[value] if isinstance(value, bool) else str(value)


def support(backbone: Backbone) -> dict[str, Any]:
    """Return the row of a model."""
    notes: list[str] = []
    depth = _text_depth(backbone)
    config = TrainConfig(
        data="",
        model="",
        method="full",
        prompt=PromptSettings(depth=min(3, depth)),
        without=("text-prompts",) if depth == 1 else (),
    )
    notes += left_out(backbone, config)
    try:
        _check_prompt(backbone)
    except ModelError as refused:
        notes.append(str(refused))
        config = replace(config, without=("prompt", "text-prompts"))
    learner = _learner(backbone, config)
    _check_texts(learner)
    _check_images(learner)
    parts = learner.parts(config)
    row: dict[str, Any] = {
        "pixels": backbone.preprocess.size[0],
        "parameters": sum(tensor.numel() for tensor in backbone.model.parameters()),
        **{part: part in parts for part in PARTS},
        "colours": _takes_colours(backbone),
        "mixture": _has_words(backbone, notes),
        "normalisation": _normalisation(backbone),
        "notes": notes,
    }
    return {**row, "text-prompts": depth if row["text-prompts"] else False}


def _text_depth(backbone: Backbone) -> int:
    """Return the number of blocks that take context vectors, the input of the tower counted."""
    for depth in count(2):
        try:
            backbone.text.check_depth(depth)
        except ModelError:
            return depth - 1
    raise AssertionError("towers end")


def _check_prompt(backbone: Backbone) -> None:
    """Check that a new prompt gives the embeddings of the words that it starts from."""
    prompt = PromptLearner(backbone, _NAMES, (0, 1), PromptSettings(depth=1))
    words = backbone.text_embeddings([f"a photo of a {name}." for name in _NAMES])
    torch.testing.assert_close(prompt(range(2)), words, rtol=0, atol=1e-5)


def _learner(backbone: Backbone, config: TrainConfig) -> Learner:
    split = FewShotSplit(_NAMES, (0, 1), (), (), {})
    zero_shot = backbone.class_embeddings(_NAMES, config.prompt.templates)
    draw = torch.Generator().manual_seed(0)
    classes, dim = zero_shot.shape
    shape = (len(SENTENCE_KINDS), classes, config.experts.centres, dim)
    centres = functional.normalize(torch.randn(shape, generator=draw), dim=-1)
    return make_learner(backbone, config, split, zero_shot, centres)


def _check_texts(learner: Learner) -> None:
    _check_gradients(
        learner.texts(range(2)).embeddings, [*learner.prompts, *learner.transforms.values()]
    )


def _check_images(learner: Learner) -> None:
    """Check the gradients of the parts trained in the visual tower, if there are any."""
    if learner.visual is not None:
        tokens = learner.prefix(_pixels(learner.backbone))
        _check_gradients(learner.images(tokens).embeddings, [learner.visual])


def _check_gradients(embeddings: Tensor, trained: Sequence[nn.Module | None]) -> None:
    """Check that a finite gradient reaches every trained module."""
    embeddings.sum().backward()
    for module in filter(None, trained):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if not (any(g.any() for g in gradients) and all(g.isfinite().all() for g in gradients)):
            raise AssertionError(f"no usable gradient reaches {type(module).__name__}")


def _takes_colours(backbone: Backbone) -> bool:
    """Tell whether a colour map in front of the tower gets a gradient."""
    matrix = torch.eye(3, requires_grad=True)
    mapped = backbone.recoloured(ColourMap(matrix, torch.zeros(3)))
    features = backbone.model.encode_image(mapped.normalise(_pixels(backbone)))
    (gradient,) = torch.autograd.grad(features.square().sum(), matrix)
    return bool(gradient.isfinite().all() and gradient.any())


def _has_words(backbone: Backbone, notes: list[str]) -> bool:
    """Tell whether the tokenizer has whole words for the pseudo-classes of the mixture."""
    try:
        pseudo_class_names(whole_words(backbone.tokens.tokenizer), len(_NAMES), 0, _NAMES)
    except ModelError as refused:
        notes.append(str(refused))
        return False
    return True


def _normalisation(backbone: Backbone) -> str:
    """Return whether the exported graph normalises pixels in a layer or folded into the first."""
    head = FoldedHead(torch.zeros(1, 1), torch.zeros(1))
    explicit = VisualClassifier(backbone, head).normalises
    return "explicit" if explicit else "folded"


def _pixels(backbone: Backbone) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    shape = (1, *backbone.preprocess.size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)


if __name__ == "__main__":
    main()
