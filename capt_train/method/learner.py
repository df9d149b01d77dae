"""Everything that is trained, in one module: prompts, semantic experts, visual parts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capt_train.clip.backbone import Backbone
from capt_train.clip.vision_tower import Tower
from capt_train.config import TrainConfig
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.prompt import PromptLearner
from capt_train.method.semantic_experts import SemanticExperts
from capt_train.method.visual_tuner import Encoded, VisualParts, VisualTuner
from capt_train.parts import GROUPS, SENTENCE_KINDS

_EMBEDDED_AT_ONCE = 256


@dataclass(frozen=True)
class Texts:
    """Class embeddings of every learned prompt."""

    embeddings: Float[Tensor, "prompts classes dim"]  # t̃, unit norm
    gates: Float[Tensor, "rows experts"] | None  # of the semantic experts


class Learner(nn.Module):
    """The trained parts; the frozen backbone is used, never owned.

    With new parts it says what the backbone says with the same prompt.
    """

    def __init__(
        self,
        backbone: Backbone,
        zero_shot: Float[Tensor, "classes dim"],
        prompts: Sequence[PromptLearner],
        semantic: SemanticExperts | None = None,
        visual: VisualTuner | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            backbone: frozen, the colours of its input mapped where that is wanted.
            zero_shot: hand-written t⁰ of every class, in force where there is no prompt.
            prompts: K learned prompts; may be empty.
            semantic: experts on class embeddings.
            visual: what is trained inside the visual tower.
        """
        super().__init__()
        self.backbone = backbone
        self._zero_shot = zero_shot
        self.prompts = nn.ModuleList(prompts)
        self._learned = tuple(prompts)  # the same, with their type
        self.semantic = semantic
        self.tuner = visual
        self.strength = 1.0  # κ

    @property
    def visual(self) -> VisualTuner | None:
        """What changes the visual tower; None where nothing does, as with κ = 0."""
        return self.tuner if self.strength else None

    def set_strength(self, strength: float) -> None:
        """Set κ: how much of the visual side's tuning is in force, 0 to 1."""
        self.strength = strength
        if self.tuner is not None:
            self.tuner.set_constants(strength=strength)

    @property
    def learned(self) -> int:
        """How many embeddings a class has besides the hand-written one."""
        return max(1, len(self.prompts))

    @property
    def trainable(self) -> bool:
        """Whether anything in force is trained."""
        return bool(self.text_parameters or self.visual_parameters)

    @property
    def size(self) -> int:
        """How many trained or fitted numbers are in force."""
        colours = self.backbone.colours
        own = sum(one.numel() for one in (*self.text_parameters, *self.visual_parameters))
        return own if colours is None else own + colours.size

    @property
    def recoloured(self) -> bool:
        """Whether the colours of the input are mapped."""
        return self.backbone.colours is not None

    def parts(self, config: TrainConfig) -> frozenset[str]:
        """Return the parts in force: those of the settings that this model can have."""
        visual = self.visual
        there = {
            "colours": self.recoloured,
            "adapter": visual is not None and len(visual.adapters) > 0,
            "sample-experts": visual is not None and visual.experts is not None,
            "visual-prompts": visual is not None and visual.prompts is not None,
            "text-prompts": len(self.prompts) > 0,
        }
        return config.parts - {part for part, found in there.items() if not found}

    @property
    def text_parameters(self) -> list[nn.Parameter]:
        """What the text side trains."""
        own = [*self.prompts.parameters()]
        return own if self.semantic is None else [*own, *self.semantic.parameters()]

    @property
    def visual_parameters(self) -> list[nn.Parameter]:
        """What the visual side trains."""
        return [] if self.visual is None else [*self.visual.parameters()]

    @torch.no_grad()
    def mean_texts(self, classes: Sequence[int]) -> Float[Tensor, "classes dim"]:
        """Return the mean over the learned prompts, in float32, to be judged with."""
        return self.texts(classes).embeddings.float().mean(dim=0)

    def texts(self, classes: Sequence[int]) -> Texts:
        """Return embeddings of some classes, given by index."""
        rows = list(classes)
        own = [prompt(rows) for prompt in self._learned] or [self._zero_shot[rows]]
        return self._moved(torch.stack(own))

    @torch.no_grad()
    def texts_of(self, class_names: Sequence[str], zero_shot: Tensor) -> Texts:
        """Return embeddings of classes by name; `zero_shot` are their hand-written ones."""
        own = [prompt.of_names(class_names) for prompt in self._learned] or [zero_shot]
        return self._moved(torch.stack(own))

    def _moved(self, own: Float[Tensor, "prompts classes dim"]) -> Texts:
        if self.semantic is None:
            return Texts(own, None)
        moved, gates = self.semantic(own.flatten(0, 1))
        return Texts(moved.unflatten(0, own.shape[:2]), gates)

    def images(
        self, tokens: Tensor, alpha: Tensor | None = None, *, shortcut: bool = False
    ) -> Encoded:
        """Return tuned image embeddings from tokens of `prefix`; see `VisualTuner.forward`."""
        visual, tower = self._reached()
        encoded: Encoded = visual(tower, tokens, alpha, shortcut=shortcut)
        return encoded

    @torch.no_grad()
    def embed_tokens(
        self, tokens: Float[Tensor, "samples tokens width"]
    ) -> Float[Tensor, "samples dim"]:
        """Return tuned embeddings of cached tokens of any number of images."""
        device = self._zero_shot.device
        parts = [
            self.images(part.to(device).float(), shortcut=True).embeddings
            for part in tokens.split(_EMBEDDED_AT_ONCE)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def prefix(self, pixels: Tensor) -> Tensor:
        """Return the frozen tokens of preprocessed pixels, RGB 0-255."""
        visual, tower = self._reached()
        return visual.prefix(tower, self.backbone.normalise(pixels))

    @torch.no_grad()
    def start(self, pixels: Tensor) -> tuple[Float[Tensor, "batch dim"], Tensor | None]:
        """Return f⁰, and where the visual side is tuned the tokens of `prefix`; of a new learner.

        A new visual side says what the frozen one does, unless it has prompts.
        """
        if self.visual is None:
            return self.backbone.image_embeddings(pixels), None
        tokens = self.prefix(pixels)
        if self.visual.prompts is not None:
            return self.backbone.image_embeddings(pixels), tokens
        return self.images(tokens).embeddings, tokens

    @torch.no_grad()
    def image_embeddings(self, pixels: Tensor) -> Float[Tensor, "batch dim"]:
        """Return unit-norm embeddings f(x) of preprocessed pixels, RGB 0-255, as tuned."""
        if self.visual is None:
            return self.backbone.image_embeddings(pixels)
        return self.images(self.prefix(pixels)).embeddings

    def _reached(self) -> tuple[VisualTuner, Tower]:
        assert self.visual is not None  # callers look first
        tower = self.backbone.tower
        assert tower is not None  # else there would be no visual parts
        return self.visual, tower


def make_learner(
    backbone: Backbone,
    config: TrainConfig,
    split: FewShotSplit,
    zero_shot: Float[Tensor, "classes dim"],
    centres: Float[Tensor, "kinds centres dim"] | None = None,
) -> Learner:
    """Return the trained parts of a run, as they are before the first step.

    Args:
        backbone: frozen.
        config: which parts, and their sizes.
        split: names the classes.
        zero_shot: hand-written t⁰ of every class.
        centres: of the semantic experts' sentences; by default zeros, to be loaded over.
    """
    parts = config.parts
    generator = torch.Generator().manual_seed(config.seed)
    semantic = None
    if "semantic-experts" in parts:
        shape = (len(SENTENCE_KINDS), config.experts.centres, zero_shot.shape[1])
        own = zero_shot.new_zeros(shape) if centres is None else centres.to(zero_shot)
        semantic = SemanticExperts(own, config.experts.temperature)
    learner = Learner(
        backbone,
        zero_shot,
        [_prompt(backbone, config, split, number, generator) for number in range(_count(config))],
        semantic,
        _visual_tuner(backbone, config, generator),
    )
    return learner.to(backbone.device)


def _count(config: TrainConfig) -> int:
    return config.prompt.count if "prompt" in config.parts else 0


def _prompt(
    backbone: Backbone,
    config: TrainConfig,
    split: FewShotSplit,
    number: int,
    generator: torch.Generator,
) -> PromptLearner:
    """Return learned prompt `number`; all but the first start a little off the words."""
    prompt = PromptLearner(
        backbone,
        split.class_names,
        split.tuned,
        words=config.prompt.words,
        random_tokens=config.prompt.random_tokens,
        class_specific=config.prompt.class_specific,
        depth=config.prompt.depth if "text-prompts" in config.parts else 1,
        generator=generator,
    )
    if number:
        noise = 0.02 * torch.randn(prompt.context.shape, generator=generator)
        prompt.context.data += noise.to(prompt.context.device)
    return prompt


def _visual_tuner(
    backbone: Backbone, config: TrainConfig, generator: torch.Generator
) -> VisualTuner | None:
    wanted = [part for part in GROUPS["visual"] if part in config.parts]
    tower = backbone.tower if wanted else None
    if tower is None:
        return None
    own = VisualParts(
        adapter_blocks=config.visual.adapter_depth if "adapter" in wanted else 0,
        experts=config.experts.count if "sample-experts" in wanted else 0,
        expert_rank=config.experts.rank,
        prompt_depth=config.visual.prompt_depth if "visual-prompts" in wanted else 0,
        prompt_tokens=config.visual.prompt_tokens,
    )
    tuner = VisualTuner(tower, own, generator)
    return tuner if any(True for _ in tuner.parameters()) else None


def left_out(backbone: Backbone, config: TrainConfig) -> list[str]:
    """Return a sentence for each wanted part that this model cannot have."""
    wanted = [part for part in GROUPS["visual"] if part in config.parts]
    if not wanted:
        return []
    tower = backbone.tower
    if tower is None:
        kind = type(backbone.model.visual).__name__
        return [
            f"the tokens of the visual tower ({kind}) cannot be reached; left out: "
            f"{', '.join(wanted)}"
        ]
    missing = []
    if "adapter" in wanted and tower.pools_class_token and tower.depth == 1:
        missing.append("the visual tower has a single block; left out: adapter")
    if "sample-experts" in wanted and not tower.pools_class_token:
        missing.append("the visual tower does not end in a class token; left out: sample-experts")
    elif "sample-experts" in wanted and tower.ffn(tower.depth - 1) is None:
        missing.append("the visual tower's FFN is not two linear layers; left out: sample-experts")
    return missing
