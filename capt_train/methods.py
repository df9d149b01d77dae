"""The methods: which parts each trains, and the settings that its paper asks for.

A new method is an entry of `METHODS`; its parts are entries of `capt_train.parts.PARTS`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from capt_train.parts import OWN

_Settings = Mapping[str, Any]


class Method(NamedTuple):
    """A named choice of parts, and of other settings where a paper says so."""

    help: str
    parts: tuple[str, ...]
    chosen: tuple[str, ...] = ()  # parts that held-out photos decide about
    # Returns the settings that choosing the method changes, for a number of shots (None: all) and
    # for `all` or `base` classes
    settings: Callable[[int | None, str], _Settings] = lambda shots, classes: {}
    arxiv: str = ""


def _sgd(epochs: int, rate: float, batch_size: int, **more: Any) -> dict[str, Any]:
    """Return what the code of CoOp and of all that build on it has in common.

    Unlike there, the rate falls with each step, not with each epoch.
    """
    return {
        "tuning.epochs": epochs,
        "tuning.learning_rate": rate,
        "tuning.batch_size": batch_size,
        "tuning.optimizer": "sgd",
        "tuning.momentum": 0.9,
        "tuning.weight_decay": 0.0005,
        "tuning.clip_norm": 0.0,
        "tuning.warmup_epochs": 1,
        "tuning.warmup_rate": 1e-5,
        "tuning.patience": 0,
        "tuning.label_noise": 0.0,
        "prompt.words": "a photo of a",
        **{name.replace("__", "."): value for name, value in more.items()},
    }


def _coop(shots: int | None, classes: str) -> _Settings:
    """Return CoOp's: 200 epochs, 100 with 2 to 7 shots, 50 with one.

    The context starts from four words, as where CoOp is measured on new classes (arXiv
    2203.05557). Unlike theirs, images are embedded once, without random crops and flips.
    """
    epochs = {1: 50, **dict.fromkeys(range(2, 8), 100)}.get(shots or 16, 200)
    return _sgd(epochs, 0.002, 32)


def _class_specific(shots: int | None, classes: str) -> _Settings:
    return {**_coop(shots, classes), "prompt.class_specific": True}


def _kgcoop(shots: int | None, classes: str) -> _Settings:
    return _sgd(100, 0.002, 128)


def _cocoop(shots: int | None, classes: str) -> _Settings:
    return _sgd(10, 0.002, 1)


def _both_towers(epochs: int, rate: float, batch_size: int, **more: Any) -> _Settings:
    """Return settings of methods that tune prompts in the first nine blocks of both towers."""
    usual = {"visual__joint": True, "prompt__depth": 9, "visual__prompt_depth": 9}
    return _sgd(epochs, rate, batch_size, **{**usual, "visual__prompt_tokens": 4, **more})


def _ivlp(shots: int | None, classes: str) -> _Settings:
    return _both_towers(20, 0.0025, 4)


def _maple(shots: int | None, classes: str) -> _Settings:
    return _both_towers(5, 0.0035, 4, prompt__words="a photo")


def _promptsrc(shots: int | None, classes: str) -> _Settings:
    """Return PromptSRC's: 20 epochs where new classes count, else 50; a mean over templates."""
    epochs = 20 if classes == "base" else 50
    return _both_towers(epochs, 0.0025, 4, prompt__templates=("openai",))


def _tac(shots: int | None, classes: str) -> _Settings:
    more = {"prompt__depth": 12, "visual__prompt_depth": 12, "visual__prompt_tokens": 5}
    return _both_towers(20, 0.0025, 8, **more, prompt__templates=("openai",))


def _adamw(steps: int, **more: Any) -> _Settings:
    """Return settings of CLIP-LoRA and of 2SFS: AdamW at 2e-4 on batches of 32."""
    usual = _sgd(10**6, 2e-4, 32, **more)
    usual |= {"tuning.optimizer": "adamw", "tuning.weight_decay": 0.01, "visual.joint": True}
    return {**usual, "tuning.warmup_epochs": 0, "tuning.most_steps": steps}


def _clip_lora(shots: int | None, classes: str) -> _Settings:
    return _adamw(500 * (shots or 16))


def _two_stages(shots: int | None, classes: str) -> _Settings:
    """Return 2SFS's: 60 % of 300 steps for each shot tune LayerNorms."""
    return _adamw(180 * (shots or 16))


def _promptkd(shots: int | None, classes: str) -> _Settings:
    return _sgd(20, 0.005, 8)


def _templates(shots: int | None, classes: str) -> _Settings:
    return {"prompt.templates": ("openai",)}


_PROMPTS = ("prompt", "text-prompts")
METHODS: Mapping[str, Method] = {
    "zeroshot": Method("the frozen model with a hand-written prompt", ()),
    "zeroshot-ensemble": Method(
        "the same with the mean over CLIP's 80 templates", (), (), _templates, "2103.00020"
    ),
    "coop": Method("learned context vectors (CoOp), by this package's optimizer", ("prompt",)),
    "coa": Method("CoOp with the confusion-aware loss", ("prompt", "coa")),
    "tcpt": Method("CoOp with margin and moment terms (TCPT)", ("prompt", "margin", "moments")),
    "cocoa": Method("CoA and the mixture (CoCoA-Mix)", ("prompt", "coa", "mixture")),
    "prompt": Method("text side alone, all its losses", ("prompt", "coa", "margin", "moments")),
    "map": Method("a linear map of class embeddings", ("map",)),
    "rows": Method(
        "Gaussian discriminant analysis in closed form (GDA)", ("rows",), arxiv="2402.04087"
    ),
    # The losses that earn their place (docs/ablation.md)
    "capt": Method(
        "prompt, map and rows, as far as held-out photos gain",
        ("colours", "prompt", "map", "rows", "coa", "infonce"),
        ("prompt", "map", "rows"),
    ),
    "full": Method("every part of CAPT, CoCoA-Mix and TCPT", tuple(OWN)),
    # As their authors train them
    "coop-paper": Method("CoOp as its authors train it", ("prompt",), (), _coop, "2109.01134"),
    "coop-specific": Method(
        "CoOp with a context for each class", ("prompt",), (), _class_specific, "2109.01134"
    ),
    "cocoop": Method(
        "CoCoOp: a context that each image shifts", ("image-prompt",), (), _cocoop, "2203.05557"
    ),
    "kgcoop": Method(
        "KgCoOp: near the hand-written prompt", ("prompt", "kgcoop"), (), _kgcoop, "2303.13283"
    ),
    "prograd": Method(
        "ProGrad: not against the hand-written prompt",
        ("prompt", "prograd"),
        (),
        _coop,
        "2205.14865",
    ),
    "ivlp": Method(
        "deep prompts in both towers, independent",
        (*_PROMPTS, "first-prompts"),
        (),
        _ivlp,
        "2210.03117",
    ),
    "maple": Method(
        "MaPLe: deep prompts, visual from text",
        (*_PROMPTS, "coupled-prompts"),
        (),
        _maple,
        "2210.03117",
    ),
    "promptsrc": Method(
        "PromptSRC: deep prompts that regulate themselves",
        (*_PROMPTS, "first-prompts", "promptsrc"),
        (),
        _promptsrc,
        "2307.06948",
    ),
    "tac": Method(
        "TAC-style: prompts that know the task's clusters",
        ("cluster-prompt", "text-prompts", "first-prompts"),
        (),
        _tac,
    ),
    "promptkd": Method(
        "PromptKD: distilled from a --teacher", ("distillation",), (), _promptkd, "2403.02781"
    ),
    "capt-promptkd": Method(
        "CAPT's contrast and experts on top of PromptKD",
        ("distillation", "infonce", "retrieval", "semantic-experts"),
        (),
        _promptkd,
        "2603.02557",
    ),
    "clip-lora": Method(
        "CLIP-LoRA: low-rank updates of both towers",
        ("text-lora", "visual-lora"),
        (),
        _clip_lora,
        "2405.18541",
    ),
    "2sfs": Method(
        "2SFS: LayerNorms of both towers, then a classifier",
        ("text-norms", "visual-norms", "linear-classifier"),
        (),
        _two_stages,
        "2503.11609",
    ),
    "class-means": Method("the nearest class mean", ("class-means",)),
    "lp-plus-plus": Method(
        "LP++: a linear probe that blends in class names", ("lp-plus-plus",), arxiv="2404.02285"
    ),
    "clap": Method("CLAP: a linear probe held near class names", ("clap",), arxiv="2312.12730"),
    "taskres": Method(
        "TaskRes: a residual beside each class embedding", ("taskres",), arxiv="2211.10277"
    ),
    "tip-adapter": Method(
        "Tip-Adapter: a cache of the photos", ("tip-adapter",), arxiv="2207.09519"
    ),
    "tip-adapter-f": Method(
        "Tip-Adapter-F: a cache with trained keys", ("tip-adapter-f",), arxiv="2207.09519"
    ),
}
