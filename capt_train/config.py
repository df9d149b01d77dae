"""All settings of a run, with defaults, ranges and help; JSON on disk."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

from capt_deploy.core.errors import CaptError, ConfigError
from capt_train.calibrators import CALIBRATORS
from capt_train.parts import GROUPS, METHODS, PARTS, loss_terms, members
from capt_train.settings import (
    ABOVE_0,
    SHARE,
    Allowed,
    Setting,
    SettingsGroup,
    at_least,
    nearest,
    one_of,
    setting,
)

_TEMPLATES = Allowed(
    "at least one text, each with {} where the class name goes",
    lambda texts: bool(texts) and all("{}" in text for text in texts),
)
_AREA = Allowed("above 0 and up to 1", lambda share: 0 < share <= 1)
_MOMENTUM = Allowed("0 or more, below 1", lambda value: 0 <= value < 1)
_NOISE = Allowed("0 to 0.5", lambda share: 0 <= share <= 0.5)
_SEED = Allowed("0 to 2**32 - 1", lambda seed: 0 <= seed < 2**32)
_OPTIMIZERS, _AUTOCASTS = ("adamw", "sgd"), ("auto", "off", "bf16", "fp16")


@dataclass(frozen=True)
class TuningSettings(SettingsGroup, group="tuning"):
    """Optimizer and epochs of the text side, which is tuned first; batches of both sides."""

    epochs: int = setting(50, "epochs of the text side", at_least(1), option="--epochs")
    learning_rate: float = setting(0.002, "peak rate of the text side", ABOVE_0, option="--lr")
    batch_size: int = setting(32, "images in a batch", at_least(1), option="--batch-size")
    optimizer: str = setting("adamw", "adamw or sgd", one_of(_OPTIMIZERS))
    momentum: float = setting(0.9, "momentum of sgd", _MOMENTUM)
    weight_decay: float = setting(0.0005, "weight decay", at_least(0))
    clip_norm: float = setting(1.0, "largest norm of the gradient; 0 for any", at_least(0))
    warmup_epochs: int = setting(1, "epochs of warm-up, at most all but one", at_least(0))
    patience: int = setting(
        10, "epochs without a better validation loss; 0 trains all", at_least(0)
    )
    autocast: str = setting("auto", "auto: bf16 on GPUs that have it", one_of(_AUTOCASTS))
    label_noise: float | None = setting(
        None, "share of wrong labels (ε); auto: as the frozen model sees it", _NOISE, none="auto"
    )


@dataclass(frozen=True)
class PromptSettings(SettingsGroup, group="prompt"):
    """The hand-written prompt and the learned ones."""

    templates: tuple[str, ...] = setting(
        ("a photo of a {}.",), "hand-written prompt with {} in it", _TEMPLATES, option="--template"
    )
    count: int = setting(1, "learned prompts (K)", at_least(1))
    words: str = setting("a photo of a", "words that the learned context starts from")
    random_tokens: int = setting(0, "random vectors to start from; 0 takes the words", at_least(0))
    class_specific: bool = setting(False, "learn a context for each class, not a shared one")
    depth: int = setting(
        3, "text blocks with a context of their own, the input counted", at_least(1)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.words.split() and not self.random_tokens:
            raise self.declared()["words"].error("words", self.words)


@dataclass(frozen=True)
class ConfusionSettings(SettingsGroup, group="confusion"):
    """The confusion bank, its miners, and sentences about confused pairs."""

    pairs: int = setting(3, "pairs mined for each image (k)", at_least(1))
    momentum: float = setting(0.9, "share of the old counts at a write-back (ρ)", SHARE)
    sentences: str | None = setting(
        None, 'JSON {"a|b": {"commonality": […], "difference": […]}}', option="--sentences"
    )
    commonality: str | None = setting(
        None, "JSON {class: [what it shares with others, …]}", option="--commonality"
    )
    difference: str | None = setting(
        None, "JSON {class: [what tells it from others, …]}", option="--difference"
    )
    llm_url: str | None = setting(
        None, "OpenAI-compatible endpoint to ask, ending in /v1", option="--llm-url"
    )
    llm_model: str | None = setting(
        None, "model to ask there; its key is $CAPT_LLM_KEY", option="--llm-model"
    )
    llm_timeout_s: float = setting(60.0, "seconds to wait for a whole answer", ABOVE_0)
    llm_retries: int = setting(5, "further attempts after a failed request", at_least(0))
    llm_backoff_s: float = setting(
        1.0, "seconds before the first retry, doubled for each further", at_least(0)
    )


@dataclass(frozen=True)
class ExpertSettings(SettingsGroup, group="experts"):
    """Semantic experts of the text side and sample experts of the visual tower."""

    centres: int = setting(5, "K-means centres for each kind of sentences (Q)", at_least(1))
    temperature: float = setting(0.1, "temperature of the attention over centres (τ_e)", ABOVE_0)
    count: int = setting(2, "sample experts", at_least(1))
    rank: int = setting(8, "rank of a sample expert's update", at_least(1))


@dataclass(frozen=True)
class VisualSettings(SettingsGroup, group="visual"):
    """Parts of the visual tower, and how they are tuned beside the text side."""

    adapter_depth: int = setting(3, "blocks with a Diff-Manner Adapter (n_a)", at_least(1))
    adapter_scale: float = setting(1.0, "s of the adapter's α = s·cᵞ", at_least(0))
    # With 1, images that the model is sure of are trained with a smaller α than they meet at
    # inference, which lost accuracy on validation images.
    adapter_exponent: float = setting(0.0, "γ of α = s·cᵞ; 0: α as at inference", at_least(0))
    prompt_depth: int = setting(3, "last blocks that have visual prompts", at_least(1))
    prompt_tokens: int = setting(4, "visual prompts in each of these blocks", at_least(1))
    learning_rate: float = setting(0.002, "peak rate of the visual side", ABOVE_0)
    text_rate: float = setting(
        0.25, "× tuning.learning_rate: the text side's rate beside it", SHARE
    )
    epochs: int = setting(6, "epochs of both sides, near the frozen embeddings", at_least(1))
    consistency: float = setting(20.0, "weight of 1 − cos(f, f⁰) in these epochs", at_least(0))
    far_epochs: int = setting(8, "further epochs, kept if validation images gain", at_least(0))
    far_consistency: float = setting(1.0, "weight of 1 − cos(f, f⁰) in those epochs", at_least(0))
    far_patience: int = setting(3, "as tuning.patience, in those epochs", at_least(1))
    strength: float | None = setting(
        None, "share of the visual tuning to keep (κ); auto: by a trial", SHARE, none="auto"
    )
    views: int = setting(5, "views of each image, itself and a held-out one included", at_least(2))
    view_area: float = setting(0.6, "smallest share of the image in a view", _AREA)


@dataclass(frozen=True)
class ColourSettings(SettingsGroup, group="colours"):
    """The map of the input's colours."""

    steps: int = setting(100, "optimizer steps", at_least(4))
    learning_rate: float = setting(0.15, "peak learning rate", ABOVE_0)


@dataclass(frozen=True)
class MixtureSettings(SettingsGroup, group="mixture"):
    """The mixture of hand-written and learned prompts."""

    margin: float = setting(0.1, "nats by which learned prompts shall be less sure", at_least(0))


@dataclass(frozen=True)
class CalibrationSettings(SettingsGroup, group="calibration"):
    """How confidences are calibrated."""

    calibrator: str | None = setting(
        None,
        f"{', '.join(CALIBRATORS)}; auto: the simplest that held-out images agree with",
        one_of(CALIBRATORS),
        none="auto",
    )


@dataclass(frozen=True)
class TrainConfig(SettingsGroup):
    """Everything that decides a run. `capt_train.pipeline` makes the paths absolute."""

    data: str = setting(MISSING, "folder, .csv, .jsonl, or split_zhou_*.json", option="--data")
    model: str = setting(
        MISSING, "ViT-B-16-quickgelu, hf-hub:NAME, or local-dir:FOLDER", option="--model"
    )
    pretrained: str | None = setting(
        None, "weights: a tag of open_clip (openai) or a checkpoint", option="--pretrained"
    )
    class_names: str | None = setting(
        None, "JSON {label: name} or two-column CSV of names", option="--class-names"
    )
    method: str = setting("capt", "which parts are trained", one_of(METHODS), option="--method")
    added: tuple[str, ...] = setting((), "parts to add", option="--with")
    without: tuple[str, ...] = setting((), "parts to leave out", option="--without")
    classes: str = setting(
        "all",
        "with base, tune on the first half of the classes",
        one_of(("all", "base")),
        option="--classes",
    )
    shots: int = setting(16, "images of each class to tune on", at_least(1), option="--shots")
    seed: int = setting(1, "seed of all random choices", _SEED, option="--seed")
    device: str = setting("auto", "where to tune: auto, cpu, cuda, cuda:1 …", option="--device")
    workers: int | None = setting(
        None, "threads that decode images [default: auto]", at_least(1), "auto", "--workers"
    )
    tuning: TuningSettings = TuningSettings()
    prompt: PromptSettings = PromptSettings()
    confusion: ConfusionSettings = ConfusionSettings()
    experts: ExpertSettings = ExpertSettings()
    visual: VisualSettings = VisualSettings()
    colours: ColourSettings = ColourSettings()
    mixture: MixtureSettings = MixtureSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    losses: Mapping[str, float] = field(default_factory=dict)  # weights; the rest by default

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "losses", {**default_losses(), **self.losses})
        known = settings()
        for name, value in self.losses.items():
            _known(f"losses.{name}", known).check(value)
        known_parts = (*PARTS, *GROUPS)
        for option, names in (("--with", self.added), ("--without", self.without)):
            for name in names:
                if name not in known_parts:
                    raise ConfigError(f"{option}: no part {name!r}; {nearest(name, known_parts)}")
        for name in self.added:
            if {*members([name])} <= {*members(self.without)}:
                raise ConfigError(f"--with {name}: --without takes it out again; drop one of them")
        self._check_together()

    def _check_together(self) -> None:
        """Raise a ConfigError for settings that do not go together."""
        confusion = self.confusion
        if bool(confusion.llm_url) != bool(confusion.llm_model):
            missing, given = ("url", "model") if confusion.llm_model else ("model", "url")
            raise ConfigError(f"--llm-{given}: expected --llm-{missing} beside it")
        if not self.needs("sentences"):
            for name in ("sentences", "commonality", "difference", "llm_url"):
                if getattr(confusion, name) is not None:
                    readers = ", ".join(part for part in PARTS if "sentences" in PARTS[part].needs)
                    raise ConfigError(
                        f"{settings()[f'confusion.{name}'].label}: nothing reads sentences; add "
                        f"--with {readers}, or leave it out"
                    )
        calibrator = self.calibration.calibrator
        if calibrator and CALIBRATORS[calibrator].needs_all_classes and self.classes == "base":
            raise ConfigError(
                "--set calibration.calibrator: expected another one with --classes base, for "
                f"{calibrator} has no factor for the classes that are not tuned on"
            )
        goals = {**self.loss_weights, "balance": 0.0}  # balance alone teaches nothing
        if self.parts and not any(goals.values()):
            raise ConfigError(f"--set losses: expected at least one above 0, came {goals!r}")

    @property
    def parts(self) -> frozenset[str]:
        """Return the parts that are switched on; none for the method `zeroshot`."""
        return frozenset(
            {*METHODS[self.method].parts, *members(self.added)} - {*members(self.without)}
        )

    @property
    def loss_weights(self) -> dict[str, float]:
        """Return the weights in force: 0 where a part is off."""
        off = [name for part in {*PARTS} - self.parts for name in PARTS[part].losses]
        return {**self.losses, **dict.fromkeys(off, 0.0)}

    def needs(self, prepared: str) -> bool:
        """Return whether a part that is on needs something prepared: `bank` or `sentences`."""
        return any(prepared in PARTS[name].needs for name in self.parts)

    def values(self) -> dict[str, Any]:
        """Return the JSON form of every setting by its name with the group."""
        return _flat(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self, dict_factory=_with_lists)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], error: type[CaptError]) -> "TrainConfig":
        """Read the JSON form.

        Raises:
            error: a key is unknown or missing, or a value cannot be used.
        """
        flat = _flat(values)
        if different := sorted({*flat} ^ {*settings()}):
            raise error(
                f"configuration: written by another version of capt (it differs in "
                f"{different[0]}, {len(different)} settings in all); tune again"
            )
        try:
            tuples = {name: tuple(v) for name, v in flat.items() if isinstance(v, list)}
            return cls(str(flat["data"]), str(flat["model"])).with_settings({**flat, **tuples})
        except ConfigError as cause:
            raise error(f"configuration: {cause}") from cause

    def with_settings(self, values: Mapping[str, Any]) -> "TrainConfig":
        """Return a copy with other values, given by names such as `tuning.epochs`.

        Text is read as the command line does it: `auto` or `none` for None, `true`, `0.001`.

        Raises:
            ConfigError: unknown name, or a value that cannot be used.
        """
        known, changes = settings(), defaultdict[str, dict[str, Any]](dict)
        for name, value in values.items():
            declared = _known(name, known)
            group, _, leaf = name.rpartition(".")
            changes[group][leaf] = declared.parse(value) if isinstance(value, str) else value
            declared.check(changes[group][leaf])
        top = changes.pop("", {})
        for group, new in changes.items():
            old = getattr(self, group)
            top[group] = {**old, **new} if group == "losses" else replace(old, **new)
        return replace(self, **top)


def settings() -> Mapping[str, Setting]:
    """Return all settings of a run by name, group after group."""
    rows = [*TrainConfig.declared().values()]
    for group in fields(TrainConfig):
        if isinstance(group.default, SettingsGroup):
            rows += group.default.declared().values()
    for name, weight in default_losses().items():
        help = f"weight of: {loss_terms()[name].help}"
        rows.append(Setting(f"losses.{name}", float, weight, help, at_least(0)))
    return {row.name: row for row in rows}


def default_losses() -> dict[str, float]:
    """Return the default weight of every loss term."""
    terms = loss_terms().items()
    return {name: term.weight for name, term in terms if term.weight is not None}


def _known(name: str, known: Mapping[str, Setting]) -> Setting:
    if name not in known:
        raise ConfigError(f"--set: no setting {name!r}; {nearest(name, known)}")
    return known[name]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        group = value if isinstance(value, dict) else None
        flat |= {name: value} if group is None else {f"{name}.{k}": v for k, v in group.items()}
    return flat


def _with_lists(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}
