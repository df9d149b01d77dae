"""The text side as a graph, so that classes can be added where a bundle is used."""

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
from capt_deploy.core.errors import GateError
from capt_deploy.core.files import write_bytes
from capt_deploy.serving.open_vocabulary import ROW_OUTPUTS, TextEncoder
from capt_train.clip.backbone import Backbone
from capt_train.method.prompt import PromptLearner
from capt_train.method.semantic_experts import SemanticExperts
from capt_train.run.folder import TunedModel
from export.graph.lower import FP32
from export.graph.onnx_graph import OPSET, OnnxGraph, external_name, to_onnx
from export.source.classes import hand_written_rows, untuned_rows
from export.text.tokenizer import cleaning_of, prove_tokens, tokenizer_json

_PROBED = 16  # class names that the written graph is asked about
_LIMIT = 1e-4  # of a logit (METHOD 9)


@dataclass(frozen=True)
class _Share:
    """What one run says of a class, and in which places of the input."""

    weights: tuple[float, ...]  # π_out, of the hand-written prompt first
    templates: list[int]  # none where the hand-written prompt has no say
    prompts: dict[int, PromptLearner]  # the learned ones
    semantic: SemanticExperts | None


class TextRows(nn.Module):
    """Token ids to scale·Ŵ_c of classes that no run was tuned on; see `untuned_rows`.

    With `hand_written` also to t⁰_c by all templates of the runs; see `hand_written_rows`.
    """

    def __init__(self, models: Sequence[TunedModel], *, hand_written: bool = False) -> None:
        """Take the text tower of the first run, and of each what was learned for it."""
        super().__init__()
        self._backbone = models[0].backbone
        self.tower = self._backbone.model  # its weights are found here; what is not used goes
        self.learners = nn.ModuleList([model.learner for model in models])
        # Where the hand-written prompt has no weight, nobody needs to compute it.
        written = [
            m.config.prompt.templates
            if m.fitted.mixture.outside[0] or not m.learner.prompts
            else ()
            for m in models
        ]
        self.hand_written = hand_written
        needed = [m.config.prompt.templates for m in models] if hand_written else written
        self._templates = [*dict.fromkeys(template for own in needed for template in own)]
        self._learned = [own for model in models for own in _learned(model)]
        places = iter(range(len(self._templates), len(self._templates) + len(self._learned)))
        self._shares = [
            _Share(
                model.fitted.mixture.outside,
                [self._templates.index(template) for template in own],
                {next(places): prompt for prompt in _learned(model)},
                model.learner.semantic,
            )
            for model, own in zip(models, written, strict=True)
        ]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The hand-written templates, and the learned prompts with words in the vectors' places."""
        words = ["a " * len(prompt.common_context) for prompt in self._learned]
        return (*self._templates, *(f"{places}{{}}." for places in words))

    def tokens(self, names: Sequence[str]) -> Int[Tensor, "classes prompts tokens"]:
        """Return the input for some classes, by the training's own tokenizer."""
        texts = [[t.replace("{}", name) for name in names] for t in self._templates]
        rows = [self._backbone.tokenize(own) for own in texts]
        rows += [prompt.tokenize(names) for prompt in self._learned]
        return torch.stack(rows, dim=1)

    def forward(
        self, tokens: Int[Tensor, "classes prompts tokens"]
    ) -> tuple[Float[Tensor, "classes dim"], ...]:
        """Return the rows, never renormalised; and those of the hand-written prompt, unit norm."""
        count = len(self._templates)
        by_template = None
        if count:
            flat = self._backbone.text.encode(tokens[:, :count].flatten(0, 1))
            by_template = flat.unflatten(0, (-1, count))
        rows = [self._rows(share, tokens, by_template) for share in self._shares]
        mixed = self._backbone.scale * torch.stack(rows).mean(dim=0)
        if not self.hand_written or by_template is None:
            return (mixed,)
        return mixed, functional.normalize(by_template.mean(dim=1), dim=-1)

    def _rows(
        self, share: _Share, tokens: Tensor, by_template: Tensor | None
    ) -> Float[Tensor, "classes dim"]:
        hand_written: list[Tensor] = []
        if by_template is not None and share.templates:
            mean = by_template[:, share.templates].mean(dim=1)
            hand_written = [functional.normalize(mean, dim=-1)]
        learned = [
            self._backbone.text.encode(tokens[:, place], prompt.common_context, prompt.deeper)
            for place, prompt in share.prompts.items()
        ] or hand_written
        if share.semantic is not None:
            learned = [share.semantic(own)[0] for own in learned]
        weights = share.weights if hand_written else share.weights[1:]
        weighted = zip(weights, [*hand_written, *learned], strict=True)
        return torch.stack([weight * own for weight, own in weighted]).sum(dim=0)


def _learned(model: TunedModel) -> list[PromptLearner]:
    return [own for own in model.learner.prompts if isinstance(own, PromptLearner)]


@torch.no_grad()
def write_open_vocabulary(
    models: Sequence[TunedModel],
    folder: Path,
    names: Sequence[str],
    *,
    hand_written: bool = False,
) -> OpenVocabulary:
    """Write `text.onnx` and `tokenizer.json`, and make sure that they say what the training says.

    Args:
        models: the run, or the runs that were merged.
        folder: of the bundle.
        names: of its classes, to try it on.
        hand_written: let the graph give hand-written rows too, as factors of DAC need them.

    Returns:
        What the manifest says of them.

    Raises:
        ModelError: the tokenizer cannot be used without torch, or the text tower not be traced.
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
    prove_tokens(texts.tokens, backbone.tokens, tokens.cpu(), names)
    prove_rows(texts, models, names[:_PROBED], hand_written=hand_written)
    return record


def _traced(
    network: TextRows, tokens: Int[Tensor, "classes prompts tokens"], backbone: Backbone
) -> OnnxGraph:
    example = tokens[[0, -1]]  # a single class would be taken for a constant
    axes: dict[int, Any] = {0: torch.export.Dim("classes")}
    if backbone.text.cuttable:
        axes[2] = torch.export.Dim("tokens", max=tokens.shape[2])
        example = example[:, :, :-1]
    network(example)  # what the tower finds out about itself must not be traced
    outputs = ROW_OUTPUTS if network.hand_written else ROW_OUTPUTS[:1]
    model = to_onnx(network, ("tokens", example, axes), outputs, OPSET, "the text tower")
    return OnnxGraph(model, OPSET, FP32)


def _record(network: TextRows, backbone: Backbone) -> OpenVocabulary:
    return OpenVocabulary(
        prompts=network.prompts,
        context_length=backbone.tokens.length,
        pad=backbone.tokens.pad,
        cuttable=backbone.text.cuttable,
        cleaning=cleaning_of(backbone.tokens.tokenizer),
        logit_bias=backbone.logit_bias,
    )


def prove_rows(
    texts: TextEncoder,
    models: Sequence[TunedModel],
    names: Sequence[str],
    *,
    hand_written: bool = False,
) -> None:
    """Make sure that a written graph gives the rows that the training gives.

    Raises:
        GateError: it gives others.
    """
    backbone = models[0].backbone
    expected = backbone.scale * untuned_rows(models, names).cpu().numpy()
    # There are no images here; texts' embeddings show as well by how much logits may differ.
    shown = backbone.class_embeddings(names, models[0].config.prompt.templates).cpu().numpy()
    difference = float(np.abs((texts.rows(names) - expected) @ shown.T).max())
    if hand_written:
        written = hand_written_rows(models, names).cpu().numpy()
        difference = max(difference, float(np.abs(texts.both_rows(names)[1] - written).max()))
    if not difference <= _LIMIT:  # nor if it is no number
        raise GateError(
            f"the text graph gives rows whose logits differ by {difference:.2g} from those of the "
            f"trained model, limit {_LIMIT:.0e}"
        )
