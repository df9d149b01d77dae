"""Export the text side as a graph, so that classes can be added where a bundle is used."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from capt_deploy.bundle.manifest import OpenVocabulary
from capt_deploy.core.console import say
from capt_deploy.core.errors import ConfigError, GateError
from capt_deploy.core.files import write_bytes
from capt_deploy.serving.open_vocabulary import ROW_OUTPUTS, TextEncoder
from capt_train.clip.backbone import Backbone, all_templates
from capt_train.method.class_rows import Outside
from capt_train.method.learner import Learner
from capt_train.method.prompt import PromptLearner
from capt_train.run.folder import TunedModel
from export.graph.lower import FP32
from export.graph.onnx_graph import OPSET, OnnxGraph, external_name, to_onnx
from export.source.classes import hand_written_rows, untuned_rows
from export.text.tokenizer import check_tokens, cleaning_name, tokenizer_json

_CHECKED_NAMES = 16
_LIMIT = 1e-4  # of a logit (METHOD 9)


@dataclass(frozen=True)
class _RunPrompts:
    """Prompts of one run with their weights and their places in the input."""

    weights: tuple[float, ...]  # π_out, of the hand-written prompt first
    templates: list[int]  # places; empty if the hand-written prompt has no weight
    prompts: dict[int, PromptLearner]  # the learned ones, by place
    learner: Learner  # whose transforms the learned embeddings go through
    outside: Outside
    centre: Float[Tensor, " dim"]  # of the tuned classes


class TextRows(nn.Module):
    """A text tower with prompts, from token ids to scale·Ŵ_c of classes outside training.

    With `hand_written` it also gives t⁰_c by all templates of the runs. See `untuned_rows` and
    `hand_written_rows`.
    """

    def __init__(self, models: Sequence[TunedModel], *, hand_written: bool = False) -> None:
        """Take the text tower of the first run, and the prompts and experts of all."""
        super().__init__()
        self._backbone = models[0].backbone
        self.tower = self._backbone.model  # registers its weights; unused ones are not exported
        self.learners = nn.ModuleList([model.learner for model in models])
        # A hand-written prompt without weight is not computed.
        templates = [all_templates(model.config.prompt.templates) for model in models]
        written = [
            texts if m.fitted.mixture.outside[0] or not m.learner.prompts else ()
            for m, texts in zip(models, templates, strict=True)
        ]
        self.hand_written = hand_written
        needed = templates if hand_written else written
        self._templates = [*dict.fromkeys(text for templates in needed for text in templates)]
        self._learned = [prompt for model in models for prompt in _learned_prompts(model)]
        places = iter(range(len(self._templates), len(self._templates) + len(self._learned)))
        self._runs = [
            _RunPrompts(
                model.fitted.mixture.outside,
                [self._templates.index(template) for template in templates],
                {next(places): prompt for prompt in _learned_prompts(model)},
                model.learner,
                model.fitted.outside,
                model.centre.detach(),
            )
            for model, templates in zip(models, written, strict=True)
        ]

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the templates, and the learned prompts with a word in the place of each vector."""
        words = ["a " * len(prompt.common_context) for prompt in self._learned]
        return (*self._templates, *(f"{places}{{}}." for places in words))

    def tokens(self, names: Sequence[str]) -> Int[Tensor, "classes prompts tokens"]:
        """Return the input for class names, by the training's tokenizer."""
        texts = [[t.replace("{}", name) for name in names] for t in self._templates]
        rows = [self._backbone.tokenize(prompts) for prompts in texts]
        rows += [prompt.tokenize(names) for prompt in self._learned]
        return torch.stack(rows, dim=1)

    def forward(
        self, tokens: Int[Tensor, "classes prompts tokens"]
    ) -> tuple[Float[Tensor, "classes dim"], ...]:
        """Return scale·Ŵ_c, never renormalised; and with `hand_written` t⁰_c, unit norm."""
        count = len(self._templates)
        by_template = None
        if count:
            flat = self._backbone.text.encode(tokens[:, :count].flatten(0, 1))
            by_template = flat.unflatten(0, (-1, count))
        rows = [self._rows(run, tokens, by_template) for run in self._runs]
        mixed = self._backbone.scale * torch.stack(rows).mean(dim=0)
        if not self.hand_written or by_template is None:
            return (mixed,)
        return mixed, functional.normalize(by_template.mean(dim=1), dim=-1)

    def _rows(
        self, run: _RunPrompts, tokens: Tensor, by_template: Tensor | None
    ) -> Float[Tensor, "classes dim"]:
        hand_written: list[Tensor] = []
        if by_template is not None and run.templates:
            mean = by_template[:, run.templates].mean(dim=1)
            hand_written = [functional.normalize(mean, dim=-1)]
        learned = [
            self._backbone.text.encode(
                tokens[:, place], prompt.common_context, prompt.deeper_context
            )
            for place, prompt in run.prompts.items()
        ] or hand_written
        learned = [run.learner.transform(texts)[0] for texts in learned]
        weights = run.weights if hand_written else run.weights[1:]
        weighted = zip(weights, [*hand_written, *learned], strict=True)
        mixed = torch.stack([weight * texts for weight, texts in weighted]).sum(dim=0)
        return run.outside.texts(mixed, run.centre)


def _learned_prompts(model: TunedModel) -> list[PromptLearner]:
    prompts = [prompt for prompt in model.learner.prompts if isinstance(prompt, PromptLearner)]
    if len(prompts) < len(model.learner.prompts):
        raise ConfigError(
            f"--open-vocab: the text side of --method {model.config.method} is more than context "
            "vectors, and cannot be exported; give the class names with --classes"
        )
    return prompts


@torch.no_grad()
def write_open_vocabulary(
    models: Sequence[TunedModel],
    folder: Path,
    names: Sequence[str],
    *,
    hand_written: bool = False,
) -> OpenVocabulary:
    """Write `text.onnx` and `tokenizer.json`, and check both against the training's text side.

    Args:
        models: the run, or the runs that were merged.
        folder: the bundle.
        names: its classes, on which both are checked.
        hand_written: add an output for t⁰_c, from which DAC factors are computed.

    Returns:
        The entry of the manifest.

    Raises:
        ModelError: the tokenizer cannot be used without torch, or the text tower cannot be traced.
        GateError: the graph gives other rows.
    """
    say("tracing the text graph")
    backbone, network = models[0].backbone, TextRows(models, hand_written=hand_written).eval()
    tokens = network.tokens(names)
    graph = _traced(network, tokens, backbone)
    record = _record(network, backbone)
    if graph.external:
        record = replace(record, weights=external_name(record.file))
    tokenizer = tokenizer_json(backbone.tokens.tokenizer).encode()
    write_bytes(folder / record.tokenizer, tokenizer)
    graph.write(folder / record.file)
    texts = TextEncoder(record, tokenizer, folder / record.file, folder if graph.external else None)
    check_tokens(texts.tokens, backbone.tokens, tokens.cpu(), names)
    check_rows(texts, models, names[:_CHECKED_NAMES], hand_written=hand_written)
    return record


def _traced(
    network: TextRows, tokens: Int[Tensor, "classes prompts tokens"], backbone: Backbone
) -> OnnxGraph:
    example = tokens[[0, -1]]  # a single class would be taken for a constant
    axes: dict[int, Any] = {0: torch.export.Dim("classes")}
    if backbone.text.cuttable:
        axes[2] = torch.export.Dim("tokens", max=tokens.shape[2])
        example = example[:, :, :-1]
    network(example)  # lets the tower fill its caches before it is traced
    outputs = ROW_OUTPUTS if network.hand_written else ROW_OUTPUTS[:1]
    model = to_onnx(network, ("tokens", example, axes), outputs, OPSET, "the text tower")
    return OnnxGraph(model, OPSET, FP32)


def _record(network: TextRows, backbone: Backbone) -> OpenVocabulary:
    return OpenVocabulary(
        prompts=network.prompts,
        context_length=backbone.tokens.length,
        pad=backbone.tokens.pad,
        cuttable=backbone.text.cuttable,
        cleaning=cleaning_name(backbone.tokens.tokenizer),
        logit_bias=backbone.logit_bias,
    )


def check_rows(
    texts: TextEncoder,
    models: Sequence[TunedModel],
    names: Sequence[str],
    *,
    hand_written: bool = False,
) -> None:
    """Check that a written graph gives the rows of the training.

    Raises:
        GateError: the rows differ.
    """
    backbone = models[0].backbone
    expected = backbone.scale * untuned_rows(models, names).cpu().numpy()
    # There are no images here, so the rows are compared by logits of text embeddings.
    probes = backbone.class_embeddings(names, models[0].config.prompt.templates).cpu().numpy()
    difference = float(np.abs((texts.rows(names) - expected) @ probes.T).max())
    if hand_written:
        written = hand_written_rows(models, names).cpu().numpy()
        difference = max(difference, float(np.abs(texts.both_rows(names)[1] - written).max()))
    if not difference <= _LIMIT:  # NaN fails too
        raise GateError(
            f"the text graph differs from the trained model: expected logits to differ by at most "
            f"{_LIMIT:.0e}, came {difference:.2g}"
        )
