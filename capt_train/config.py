"""All settings of a run, with their defaults, in one place; JSON on disk."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args, get_type_hints

from capt_deploy.core.errors import CaptError, ConfigError
from capt_train.parts import CALIBRATORS, GROUPS, METHODS, PARTS, members


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms (METHOD 6); the terms themselves are unweighted."""

    cross_entropy: float = 1.0
    coa: float = 1.0  # w of CoCoA-Mix (arXiv 2506.07484); 1 is ours
    infonce: float = 1.0  # CAPT (arXiv 2603.02557)
    margin: float = 1.0  # TCPT (arXiv 2602.19024)
    moments: float = 5.0  # TCPT
    balance: float = 0.01  # importance loss of the routers, wherever there are experts


@dataclass(frozen=True)
class TrainConfig:
    """One run. Paths are as the user gave them; `capt_train.pipeline` makes them absolute."""

    data: str
    model: str  # anything open_clip takes: ViT-B-16, hf-hub:…, local-dir:…
    pretrained: str | None = None  # open_clip's tag or a checkpoint file
    class_names: str | None = None  # file that renames classes
    method: str = "capt"
    added: tuple[str, ...] = ()  # parts or groups on top of the method's
    without: tuple[str, ...] = ()  # parts or groups that are left out
    classes: str = "all"  # or "base": the first half in label order
    shots: int = 16  # images per class
    seed: int = 1
    device: str = "auto"

    # colours
    colour_steps: int = 100
    colour_learning_rate: float = 0.15

    # text side
    templates: tuple[str, ...] = ("a photo of a {}.",)  # of the hand-written prompt t⁰
    prompts: int = 1  # K learned prompts
    context_init: str = "a photo of a"  # words whose embeddings the context starts from
    context_tokens: int = 0  # M > 0: that many random vectors instead of the words
    class_specific: bool = False  # one context per class instead of a shared one
    text_depth: int = 3  # blocks with context vectors of their own, the input counted

    # confusion bank and miners
    mined_pairs: int = 3  # k, of each sample
    bank_momentum: float = 0.9  # ρ
    sentences: str | None = None  # JSON file {"a|b": {"commonality": […], "difference": […]}}
    commonality: str | None = None  # JSON file {class: [sentence, …]}
    difference: str | None = None  # likewise
    llm_url: str | None = None  # an OpenAI-compatible endpoint
    llm_model: str | None = None
    llm_timeout_s: float = 60.0  # of one request
    llm_retries: int = 5
    llm_backoff_s: float = 1.0  # before the first retry, doubled for each further one

    # experts, adapter and prompts
    centres: int = 5  # Q, of each kind of sentences
    centre_temperature: float = 0.1  # τ_e; ours
    experts: int = 2  # sample experts
    expert_rank: int = 8
    adapter_blocks: int = 3  # n_a
    adapter_scale: float = 1.0  # s of α = s·cᵞ
    # γ of α = s·cᵞ; with 0, images in training get the very α of inference (ours): with 1 the sure
    # ones are trained with a smaller α than they meet later, which lost accuracy on validation
    adapter_exponent: float = 0.0
    visual_depth: int = 3  # of the last blocks have visual prompts
    visual_tokens: int = 4  # in each of them
    strength: str = "auto"  # κ, 0 to 1; auto: by a trial, as far as unseen classes gain too
    views: int = 5  # of each image; the first is the image itself, the last is never tuned on
    view_area: float = 0.6  # smallest share of the image that a view shows
    mixture_margin: float = 0.1  # d, nats; ours
    # auto: the simplest that other images agree with; or temperature, line, isotonic, vector
    calibrator: str = "auto"

    # tuning: first the text side on cached embeddings, then both sides on cached tokens
    optimizer: str = "adamw"  # or "sgd"
    learning_rate: float = 0.002  # of the text side
    visual_learning_rate: float = 0.002
    text_rate_beside_visual: float = 0.25  # × learning_rate, in the second stage
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.0005
    clip_norm: float = 1.0  # of the whole gradient; 0 leaves it as it is
    batch_size: int = 32
    epochs: int = 50  # of the text side
    visual_epochs: int = 6  # of both sides, the visual one near the frozen one
    far_epochs: int = 8  # and then far from it, if that helps on validation images; 0 never tries
    far_patience: int = 3
    consistency: float = 20.0  # weight of 1 − cos(f, f⁰) while near; ours
    far_consistency: float = 1.0  # and while far
    warmup_epochs: int = 1  # all but one where there are no more
    patience: int = 10  # epochs without a better validation NLL; 0 trains all epochs
    autocast: str = "auto"  # or "off", "bf16", "fp16"; auto: bf16 on GPUs that have it
    # ε, the share of labels that are wrong by chance, 0 to 0.5; auto: as the frozen model sees it,
    # 0 unless that is sure (capt_train.calibrate.label_noise)
    label_noise: str = "auto"
    weights: LossWeights = LossWeights()

    def __post_init__(self) -> None:
        checks = [
            (self.method in METHODS, "method", f"one of {', '.join(METHODS)}"),
            (self.classes in ("all", "base"), "classes", "all or base"),
            (self.optimizer in ("adamw", "sgd"), "optimizer", "adamw or sgd"),
            (self.shots >= 1, "shots", "at least 1"),
            (self.epochs >= 1, "epochs", "at least 1"),
            (self.batch_size >= 1, "batch_size", "at least 1"),
            (self.warmup_epochs >= 0, "warmup_epochs", "0 or more"),
            (self.patience >= 0, "patience", "0 or more"),
            (self.context_tokens >= 0, "context_tokens", "0 or more"),
            (0 <= self.seed < 2**32, "seed", "0 up to 2**32 - 1"),
            (self.colour_steps >= 4, "colour_steps", "at least 4"),
            (0 < self.colour_learning_rate < math.inf, "colour_learning_rate", "a number above 0"),
            (0 < self.learning_rate < math.inf, "learning_rate", "a number above 0"),
            (0 <= self.momentum < 1, "momentum", "0 up to below 1"),
            (0 <= self.weight_decay < math.inf, "weight_decay", "a number, 0 or more"),
            (0 <= self.bank_momentum <= 1, "bank_momentum", "0 up to 1"),
            (0 < self.centre_temperature < math.inf, "centre_temperature", "a number above 0"),
            (0 <= self.adapter_scale < math.inf, "adapter_scale", "a number, 0 or more"),
            (0 <= self.adapter_exponent < math.inf, "adapter_exponent", "a number, 0 or more"),
            (0 < self.view_area <= 1, "view_area", "above 0 up to 1"),
            (0 <= self.mixture_margin < math.inf, "mixture_margin", "a number, 0 or more"),
            (0 < self.visual_learning_rate < math.inf, "visual_learning_rate", "above 0"),
            (0 <= self.text_rate_beside_visual <= 1, "text_rate_beside_visual", "0 up to 1"),
            (0 <= self.clip_norm < math.inf, "clip_norm", "a number, 0 or more"),
            (self.autocast in ("auto", "off", "bf16", "fp16"), "autocast", "auto, off, bf16, fp16"),
            (bool(self.llm_url) == bool(self.llm_model), "llm_url", "both llm_url and llm_model"),
            (_is_share(self.strength, 1.0), "strength", "auto, or a number from 0 to 1"),
            (_is_share(self.label_noise, 0.5), "label_noise", "auto, or a number from 0 to 0.5"),
            (
                self.calibrator in ("auto", *CALIBRATORS),
                "calibrator",
                f"one of auto, {', '.join(CALIBRATORS)}",
            ),
            (
                self.calibrator != "vector" or self.classes == "all",
                "calibrator",
                "another one with classes base, for vector leaves the others no factor",
            ),
            (self.views >= 2, "views", "at least 2, for one of them is not tuned on"),
            (bool(self.templates), "templates", "at least one"),
            (all("{}" in text for text in self.templates), "templates", "{} where the name goes"),
            (bool(self.context_init.split()) or self.context_tokens, "context_init", "words"),
        ]
        known = f"parts {', '.join(PARTS)} or groups {', '.join(GROUPS)}"
        for name in ("added", "without"):
            checks.append(({*getattr(self, name)} <= {*PARTS, *GROUPS}, name, known))
        for name in ("prompts", "text_depth", "mined_pairs", "centres", "experts", "expert_rank"):
            checks.append((getattr(self, name) >= 1, name, "at least 1"))
        for name in (
            "visual_depth",
            "visual_tokens",
            "adapter_blocks",
            "visual_epochs",
            "far_patience",
        ):
            checks.append((getattr(self, name) >= 1, name, "at least 1"))
        for name in ("consistency", "far_consistency", "far_epochs"):
            checks.append((0 <= getattr(self, name) < math.inf, name, "a number, 0 or more"))
        own = tuple(asdict(self.weights).values())
        checks.append((all(0 <= w < math.inf for w in own), "weights", "numbers, 0 or more"))
        if self.method in METHODS and "semantic-experts" not in self.parts:
            for name in ("sentences", "commonality", "difference", "llm_url"):
                unused = f"--with semantic-experts, which alone reads it, or no {name}"
                checks.append((getattr(self, name) is None, name, unused))
        for fine, name, expected in checks:
            if not fine:
                raise ConfigError(f"{name}: expected {expected}, came {getattr(self, name)!r}")
        goals = {**asdict(self.loss_weights), "balance": 0.0}  # balance alone teaches nothing
        if self.parts and not any(goals.values()):
            raise ConfigError(f"weights: expected at least one above 0, came {goals!r}")

    @property
    def parts(self) -> frozenset[str]:
        """What is switched on. The method `zeroshot` has nothing."""
        on = {*METHODS[self.method], *members(self.added)} - {*members(self.without)}
        return frozenset(on)

    @property
    def fixed_strength(self) -> float | None:
        """κ where it is given, None where it is to be found."""
        return None if self.strength == "auto" else float(self.strength)

    @property
    def fixed_label_noise(self) -> float | None:
        """ε where it is given, None where it is to be found."""
        return None if self.label_noise == "auto" else float(self.label_noise)

    @property
    def loss_weights(self) -> LossWeights:
        """The weights in force: 0 where a part is off."""
        off = {*asdict(self.weights)} & {*PARTS} - self.parts
        return replace(self.weights, **dict.fromkeys(off, 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self) | {name: list(getattr(self, name)) for name in _TUPLES}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], error: type[CaptError]) -> "TrainConfig":
        """Read the JSON form.

        Raises:
            error: a key is unknown or a value cannot be used.
        """
        try:
            weights = LossWeights(**values["weights"])
            tuples = {name: tuple(values[name]) for name in _TUPLES}
            return cls(**{**values, "weights": weights, **tuples})
        except (TypeError, KeyError, ConfigError) as cause:
            raise error(f"configuration: {cause}") from cause

    def with_settings(self, settings: Mapping[str, str]) -> "TrainConfig":
        """Return a copy with `NAME=VALUE` settings from the command line applied.

        Loss weights are set by their own names.

        Raises:
            ConfigError: unknown name, or a value of another type.
        """
        own: dict[str, Any] = {}
        weights: dict[str, float] = {}
        weight_names = {f.name for f in fields(LossWeights)}
        types = get_type_hints(type(self))
        for name, text in settings.items():
            if name in weight_names:
                weights[name] = _parse(name, text, float)
            elif name in types and types[name] in (int, float, bool, str):
                own[name] = _parse(name, text, types[name])
            else:
                scalars = [n for n in types if not get_args(types[n]) and n != "weights"]
                raise ConfigError(
                    f"no setting {name!r}; there are {sorted(weight_names)}, {scalars}"
                )
        changed = replace(self, **own)
        if not weights:
            return changed
        return replace(changed, weights=replace(changed.weights, **weights))


def _is_share(text: str, most: float) -> bool:
    try:
        return text == "auto" or 0 <= float(text) <= most
    except (TypeError, ValueError):
        return False


_TUPLES = ("templates", "added", "without")


def _parse(name: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{name}: expected true or false, came {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as cause:
        raise ConfigError(f"{name}: expected {kind.__name__}, came {text!r}") from cause
