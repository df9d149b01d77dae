"""The groups of a run's settings, with defaults, ranges and help."""

from dataclasses import dataclass

from capt_train.calibrators import CALIBRATORS
from capt_train.settings import (
    ABOVE_0,
    CLIP_TEMPLATES,
    SHARE,
    Allowed,
    SettingsGroup,
    at_least,
    one_of,
    setting,
)

_TEMPLATES = Allowed(
    f"at least one text, each with {{}} where the class name goes, or {CLIP_TEMPLATES}",
    lambda texts: bool(texts) and all("{}" in text or text == CLIP_TEMPLATES for text in texts),
)
_AREA = Allowed("above 0 and up to 1", lambda share: 0 < share <= 1)
_MOMENTUM = Allowed("0 or more, below 1", lambda value: 0 <= value < 1)
_NOISE = Allowed("0 to 0.5", lambda share: 0 <= share <= 0.5)
_SIDES = ("images", "classes")
_OPTIMIZERS, _AUTOCASTS = ("adamw", "sgd"), ("auto", "off", "bf16", "fp16")


@dataclass(frozen=True)
class TuningSettings(SettingsGroup, group="tuning"):
    """Optimizer and epochs of the text side, which is tuned first."""

    epochs: int = setting(50, "epochs of the text side", at_least(1), option="--epochs")
    learning_rate: float = setting(0.006, "peak rate of the text side", ABOVE_0, option="--lr")
    batch_size: int = setting(1024, "images in a batch", at_least(1), option="--batch-size")
    most_steps: int | None = setting(
        None, "steps after which no further epoch begins", at_least(1), none="any"
    )
    optimizer: str = setting("adamw", "adamw or sgd", one_of(_OPTIMIZERS))
    momentum: float = setting(0.9, "momentum of sgd", _MOMENTUM)
    weight_decay: float = setting(0.0005, "weight decay", at_least(0))
    clip_norm: float = setting(1.0, "largest norm of the gradient; 0 for any", at_least(0))
    warmup_epochs: int = setting(1, "epochs of warm-up, at most all but one", at_least(0))
    warmup_rate: float | None = setting(
        None, "rate of the warm-up; auto: rises to the peak", ABOVE_0, none="auto"
    )
    patience: int = setting(
        10, "epochs without a better validation loss; 0 trains all", at_least(0)
    )
    autocast: str = setting("auto", "auto: bf16 on GPUs that have it", one_of(_AUTOCASTS))
    label_noise: float | None = setting(
        None,
        "share of wrong labels (ε); auto: as folds show it",
        _NOISE,
        none="auto",
    )


@dataclass(frozen=True)
class PromptSettings(SettingsGroup, group="prompt"):
    """The hand-written prompt and the learned ones."""

    templates: tuple[str, ...] = setting(
        ("a photo of a {}.",),
        f"hand-written prompt with {{}} in it; {CLIP_TEMPLATES}: the mean over CLIP's 80",
        _TEMPLATES,
        option="--template",
    )
    count: int = setting(1, "learned prompts (K)", at_least(1))
    words: str = setting("a photo of a", "words that the learned context starts from")
    random_tokens: int = setting(0, "random vectors to start from; 0 takes the words", at_least(0))
    class_specific: bool = setting(False, "learn a context for each class, not a shared one")
    depth: int = setting(
        3, "first text blocks with a context of their own, at most those there are", at_least(1)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.words.split() and not self.random_tokens:
            raise self.declared()["words"].error("words", self.words)


@dataclass(frozen=True)
class MapSettings(SettingsGroup, group="map"):
    """The linear map of class embeddings."""

    side: str | None = setting(
        None,
        "whose norm is restored while it is fitted: images or classes; auto: as photos judge",
        one_of(_SIDES),
        none="auto",
    )
    ridge: float | None = setting(
        None, "weight of its squared norm, in logits; auto: as photos judge", at_least(0), "auto"
    )


@dataclass(frozen=True)
class RowSettings(SettingsGroup, group="rows"):
    """Rows of the classes with photos, in closed form."""

    weight: float | None = setting(
        None, "their weight beside the class embeddings (α); auto: as photos judge", ABOVE_0, "auto"
    )


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

    centres: int = setting(5, "centres of a class's sentences of each kind (Q)", at_least(1))
    temperature: float = setting(0.1, "temperature of the attention over centres (τ_e)", ABOVE_0)
    count: int = setting(2, "sample experts", at_least(1))
    rank: int = setting(8, "rank of an expert's update", at_least(1))


@dataclass(frozen=True)
class VisualSettings(SettingsGroup, group="visual"):
    """Parts of the visual tower, and how they are tuned after the text side."""

    adapter_depth: int = setting(3, "blocks with a Diff-Manner Adapter (n_a)", at_least(1))
    adapter_scale: float = setting(1.0, "s of the adapter's α = s·cᵞ", at_least(0))
    # With 1, images that the model is sure of are trained with a smaller α than they meet at
    # inference, which lost accuracy on validation images.
    adapter_exponent: float = setting(0.0, "γ of α = s·cᵞ; 0: α as at inference", at_least(0))
    joint: bool = setting(False, "tune with the text side in one stage, by the settings of tuning")
    prompt_depth: int = setting(3, "blocks that have visual prompts", at_least(1))
    prompt_tokens: int = setting(4, "visual prompts in each of these blocks", at_least(1))
    lora_rank: int = setting(2, "rank of LoRA's updates", at_least(1))
    lora_depth: int = setting(3, "last blocks that have LoRA", at_least(1))
    norm_depth: int = setting(3, "last blocks whose LayerNorms are tuned", at_least(1))
    learning_rate: float = setting(0.002, "peak rate of the visual side", ABOVE_0)
    batch_size: int = setting(32, "images in a batch", at_least(1))
    epochs: int = setting(10, "epochs of the visual side", at_least(1))
    patience: int = setting(3, "as tuning.patience, of the visual side", at_least(0))
    consistency: float = setting(5.0, "weight of 1 − cos(f, f⁰)", at_least(0))
    strength: float | None = setting(
        None, "share of the visual tuning to keep (κ); auto: by a trial", SHARE, none="auto"
    )
    views: int = setting(5, "views of each image, itself and a held-out one included", at_least(2))
    view_area: float = setting(0.6, "smallest share of the image in a view", _AREA)


@dataclass(frozen=True)
class DistillationSettings(SettingsGroup, group="distillation"):
    """The teacher of PromptKD, and photos without labels."""

    teacher: str | None = setting(
        None, "model or run to learn from, as --model or a run folder", option="--teacher"
    )
    pretrained: str | None = setting(
        None, "weights of the teacher, as --pretrained", option="--teacher-pretrained"
    )
    unlabelled: str | None = setting(
        None,
        "folder of photos without labels [default: the training photos]",
        option="--unlabelled",
    )


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
