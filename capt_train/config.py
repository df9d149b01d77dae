"""All settings of a run, with their defaults, in one place; JSON on disk."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args, get_type_hints

from capt_deploy.errors import CaptError, ConfigError


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms (METHOD 6); the terms themselves are unweighted."""

    cross_entropy: float = 1.0
    coa: float = 1.0  # w of CoCoA-Mix (arXiv 2506.07484); 1 is ours
    margin: float = 1.0  # TCPT (arXiv 2602.19024)
    moments: float = 5.0  # TCPT


# What each --method trains. "capt" and "cocoa" get their names when the confusion bank and the
# mixture are there; until then "prompt" is everything on the text side.
METHODS: Mapping[str, LossWeights] = {
    "zeroshot": LossWeights(0.0, 0.0, 0.0, 0.0),
    "coop": LossWeights(coa=0.0, margin=0.0, moments=0.0),
    "coa": LossWeights(margin=0.0, moments=0.0),
    "tcpt": LossWeights(coa=0.0),
    "prompt": LossWeights(),
}


@dataclass(frozen=True)
class TrainConfig:
    """One run. Paths are as the user gave them; `capt_train.pipeline` makes them absolute."""

    data: str
    model: str  # anything open_clip takes: ViT-B-16, hf-hub:…, local-dir:…
    pretrained: str | None = None  # open_clip's tag or a checkpoint file
    class_names: str | None = None  # file that renames classes
    method: str = "prompt"
    classes: str = "all"  # or "base": the first half in label order
    shots: int = 16  # images per class
    seed: int = 1
    templates: tuple[str, ...] = ("a photo of a {}.",)  # of the hand-written prompt t⁰
    context_init: str = "a photo of a"  # words whose embeddings the context starts from
    context_tokens: int = 0  # M > 0: that many random vectors instead of the words
    class_specific: bool = False  # one context per class instead of a shared one
    optimizer: str = "adamw"  # or "sgd"
    learning_rate: float = 0.002
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.0005
    batch_size: int = 32
    epochs: int = 50
    warmup_epochs: int = 1  # all but one where there are no more
    patience: int = 10  # epochs without a better validation NLL; 0 trains all epochs
    device: str = "auto"
    weights: LossWeights | None = None  # of the method, unless given

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
            (0 < self.learning_rate < math.inf, "learning_rate", "a number above 0"),
            (0 <= self.momentum < 1, "momentum", "0 up to below 1"),
            (0 <= self.weight_decay < math.inf, "weight_decay", "a number, 0 or more"),
            (bool(self.templates), "templates", "at least one"),
            (all("{}" in text for text in self.templates), "templates", "{} where the name goes"),
            (bool(self.context_init.split()) or self.context_tokens, "context_init", "words"),
        ]
        if self.method in METHODS:
            own = tuple(asdict(self.loss_weights).values())
            checks += [
                (all(0 <= w < math.inf for w in own), "weights", "numbers, 0 or more"),
                (any(own) or self.method == "zeroshot", "weights", "at least one above 0"),
            ]
        for fine, name, expected in checks:
            if not fine:
                raise ConfigError(f"{name}: expected {expected}, came {getattr(self, name)!r}")

    @property
    def loss_weights(self) -> LossWeights:
        """The weights in force."""
        return self.weights or METHODS[self.method]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with the weights in force."""
        weights = asdict(self.loss_weights)
        return {**asdict(self), "templates": list(self.templates), "weights": weights}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], error: type[CaptError]) -> "TrainConfig":
        """Read the JSON form.

        Raises:
            error: a key is unknown or a value cannot be used.
        """
        try:
            weights = LossWeights(**values["weights"])
            templates = tuple(values["templates"])
            return cls(**{**values, "weights": weights, "templates": templates})
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
        return replace(changed, weights=replace(changed.loss_weights, **weights))


def _parse(name: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{name}: expected true or false, came {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as cause:
        raise ConfigError(f"{name}: expected {kind.__name__}, came {text!r}") from cause
