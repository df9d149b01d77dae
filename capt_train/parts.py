"""The parts of the method, without torch: what each adds, and which of them a method trains.

A new part is an entry of `PARTS` and a file in capt_train/method.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, NamedTuple

# Kinds of sentences about two confused classes (METHOD 3)
SENTENCE_KINDS = ("commonality", "difference")


@dataclass(frozen=True)
class LossTerm:
    """A term of the loss: `code` names a function of a `Step` as `module:function`."""

    code: str
    help: str
    weight: float | None = 1.0  # by default; None where the stage decides, not a setting


@dataclass(frozen=True)
class Part:
    """A piece of the method that is switched on and off alone; its `code` is imported when used.

    The code of side `text` is a `ClassTransform`, that of side `visual` a `VisualPart`; see
    capt_train/method/base.py. A part without code acts at one place of the run: before tuning
    (colours), in the prompts, in the contrast (retrieval), or after tuning (mixture).
    """

    help: str
    side: Literal["text", "visual"] | None = None  # also names the stage that trains the part
    code: str = ""  # module:class
    losses: Mapping[str, LossTerm] = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # what must be prepared before tuning: bank, sentences
    # Tells whether a learner has the part; by default, where its code was built
    in_force: Callable[[Any], bool] | None = None


_METHOD = "capt_train.method"
_TERMS = f"{_METHOD}.loss_terms"
# In the order of METHOD.md, which is also the order in which they are composed.
PARTS: dict[str, Part] = {
    "colours": Part(
        "a map of the input's colours to those of natural photos, where it gains",
        in_force=lambda learner: learner.recoloured,
    ),
    "prompt": Part("learned context vectors instead of the hand-written prompt"),
    "text-prompts": Part(
        "new context vectors in deeper blocks of the text tower",
        in_force=lambda learner: len(learner.prompts) > 0,
    ),
    "retrieval": Part("confused samples of the bank join infonce (SAM)", needs=("bank",)),
    "adapter": Part(
        "Diff-Manner Adapter in the visual tower", "visual", f"{_METHOD}.adapter:Adapters"
    ),
    "semantic-experts": Part(
        "experts on what confused classes share and differ in",
        "text",
        f"{_METHOD}.semantic_experts:SemanticExperts",
        needs=("sentences",),
    ),
    "map": Part("a linear map of class embeddings", "text", f"{_METHOD}.class_map:ClassMap"),
    "rows": Part(
        "a row for each class with photos, in closed form (GDA)",
        in_force=lambda learner: learner.rows is not None,
    ),
    "sample-experts": Part(
        "experts in the visual tower's last FFN",
        "visual",
        f"{_METHOD}.sample_experts:SampleExperts",
    ),
    "visual-prompts": Part(
        "free tokens in the blocks of the visual tower",
        "visual",
        f"{_METHOD}.visual_prompts:VisualPrompts",
    ),
    "lora": Part(
        "low-rank updates of the ViT's attention and FFN (LoRA)",
        "visual",
        f"{_METHOD}.weight_updates:LoRA",
    ),
    "layer-norm": Part(
        "tuned LayerNorms of the visual tower (2SFS)",
        "visual",
        f"{_METHOD}.weight_updates:LayerNorms",
    ),
    "coa": Part(
        "confusion-aware loss of CoCoA-Mix",
        losses={"coa": LossTerm(f"{_TERMS}:coa", "1 − p(y), CoCoA-Mix (arXiv 2506.07484)")},
    ),
    "infonce": Part(
        "contrast restricted to classes that the bank confuses",
        losses={"infonce": LossTerm(f"{_TERMS}:infonce", "InfoNCE of CAPT (arXiv 2603.02557)")},
        needs=("bank",),
    ),
    "margin": Part(
        "margin term of TCPT",
        # TCPT's weight is 1; on validation images that lost accuracy, most on new classes
        losses={"margin": LossTerm(f"{_TERMS}:margin", "margin term of TCPT, 2602.19024", 0.1)},
    ),
    "moments": Part(
        "moment term of TCPT",
        losses={"moments": LossTerm(f"{_TERMS}:moments", "moment term of TCPT", 5.0)},
    ),
    "mixture": Part("weights of the hand-written prompt and learned components"),
}
# Short names for parts that belong together.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "tcpt": ("margin", "moments"),
    "bank": ("infonce", "retrieval"),
    "experts": ("semantic-experts", "sample-experts"),
    "visual": ("adapter", "sample-experts", "visual-prompts", "lora", "layer-norm"),
    "deep-prompts": ("text-prompts", "visual-prompts"),
}


class Method(NamedTuple):
    """A named choice of parts, and of other settings where a paper says so."""

    help: str
    parts: tuple[str, ...]
    chosen: tuple[str, ...] = ()  # parts that held-out photos decide about
    # Returns, for a number of shots, the settings that choosing the method changes
    settings: Callable[[Any], Mapping[str, Any]] = lambda shots: {}


def _coop_settings(shots: Any) -> Mapping[str, Any]:
    """Return the settings of CoOp's authors (arXiv 2109.01134, configs of their code).

    The context starts from four words, as where CoOp is measured on new classes (arXiv
    2203.05557). Unlike theirs, images are embedded once, without random crops and flips, and the
    rate falls with each step, not each epoch.
    """
    few, fewest = shots in range(2, 8), shots == 1
    return {
        "tuning.epochs": 50 if fewest else 100 if few else 200,
        "tuning.learning_rate": 0.002,
        "tuning.batch_size": 32,
        "tuning.optimizer": "sgd",
        "tuning.momentum": 0.9,
        "tuning.weight_decay": 0.0005,
        "tuning.clip_norm": 0.0,
        "tuning.warmup_epochs": 1,
        "tuning.warmup_rate": 1e-5,
        "tuning.patience": 0,
        "tuning.label_noise": 0.0,
        "prompt.words": "a photo of a",
    }


METHODS: Mapping[str, Method] = {
    "zeroshot": Method("the frozen model with a hand-written prompt", ()),
    "coop": Method("learned context vectors (CoOp), by this package's optimizer", ("prompt",)),
    "coop-paper": Method("CoOp as its authors train it", ("prompt",), settings=_coop_settings),
    "coa": Method("CoOp with the confusion-aware loss", ("prompt", "coa")),
    "tcpt": Method("CoOp with margin and moment terms (TCPT)", ("prompt", "margin", "moments")),
    "cocoa": Method("CoA and the mixture (CoCoA-Mix)", ("prompt", "coa", "mixture")),
    "prompt": Method("text side alone, all its losses", ("prompt", "coa", "margin", "moments")),
    "map": Method("a linear map of class embeddings", ("map",)),
    "rows": Method("Gaussian discriminant analysis in closed form", ("rows",)),
    # The losses that earn their place (docs/ablation.md)
    "capt": Method(
        "prompt, map and rows, as far as held-out photos gain",
        ("colours", "prompt", "map", "rows", "coa", "infonce"),
        ("prompt", "map", "rows"),
    ),
    "full": Method("every part", tuple(PARTS)),
}


def members(names: Iterable[str]) -> list[str]:
    """Return the parts behind names of parts and groups."""
    return [part for name in names for part in GROUPS.get(name, (name,))]


def loss_terms() -> dict[str, LossTerm]:
    """Return all loss terms by name, in the order in which they are summed."""
    terms = {"cross_entropy": LossTerm(f"{_TERMS}:cross_entropy", "cross-entropy")}
    for part in PARTS.values():
        terms |= part.losses
    consistency = LossTerm(f"{_TERMS}:consistency", "1 − cos(f, f⁰)", None)
    balance = LossTerm(f"{_TERMS}:balance", "importance loss of the experts' routers", 0.01)
    return {**terms, "consistency": consistency, "balance": balance}


def load(code: str) -> Any:
    """Import the class or function that `code` names as `module:name`."""
    module, _, name = code.partition(":")
    return getattr(import_module(module), name)
