"""The parts of all methods, without torch: what each adds and which code it names.

A new part is an entry of `PARTS` and a file in capt_train/method or capt_train/published.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

# Kinds of sentences about two confused classes (METHOD 3)
SENTENCE_KINDS = ("commonality", "difference")


@dataclass(frozen=True)
class LossTerm:
    """A term of the loss: `code` names a function of a `Step` as `module:function`."""

    code: str
    help: str
    weight: float | None = 1.0  # by default; None where the stage decides, not a setting
    replaces: str = ""  # a term that is left out where this one is in force


@dataclass(frozen=True)
class Part:
    """A piece of a method that is switched on and off alone; its `code` is imported when used.

    The code of side `prompt` is a `ClassPrompt`, of `text` a `ClassTransform`, of `rows` a
    `RowPart`, of `visual` a `VisualPart`; see capt_train/method/base.py. A part without code acts
    at one place of the run: before tuning (colours), in the prompts, in the contrast (retrieval),
    or after tuning (mixture).
    """

    help: str
    side: Literal["prompt", "text", "rows", "visual"] | None = None
    code: str = ""  # module:class
    losses: Mapping[str, LossTerm] = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # what must be prepared before tuning: bank, sentences, teacher
    # Tells whether a learner has the part; by default, where its code was built
    in_force: Callable[[Any], bool] | None = None
    closed_form: bool = False  # whether no loss reaches it
    excludes: tuple[str, ...] = ()  # parts that cannot be beside it
    single_prompt: bool = False  # whether it needs one context, shared by all classes
    guide: str = ""  # module:function of a `Step`: a loss that no step may raise
    average: str = ""  # module:function of an epoch and the settings: its weight in the mean


_METHOD, _PUBLISHED = "capt_train.method", "capt_train.published"
_TERMS = f"{_METHOD}.loss_terms"
# Of METHOD.md, in its order, which is also the order in which they are composed.
OWN: dict[str, Part] = {
    "colours": Part(
        "a map of the input's colours to those of natural photos, where it gains",
        in_force=lambda learner: learner.recoloured,
    ),
    "prompt": Part(
        "learned context vectors instead of the hand-written prompt",
        "prompt",
        f"{_METHOD}.prompt:PromptLearner",
    ),
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
        "rows",
        f"{_METHOD}.class_rows:GaussianRows",
        closed_form=True,
    ),
    "sample-experts": Part(
        "experts in the visual tower's last FFN",
        "visual",
        f"{_METHOD}.sample_experts:SampleExperts",
    ),
    "visual-prompts": Part(
        "free tokens in the last blocks of the visual tower",
        "visual",
        f"{_METHOD}.visual_prompts:VisualPrompts",
    ),
    "lora": Part(
        "low-rank updates of the ViT's last blocks (LoRA)",
        "visual",
        f"{_METHOD}.weight_updates:LoRA",
    ),
    "layer-norm": Part(
        "tuned LayerNorms of the visual tower's last blocks",
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
# Of methods that others have published, to compare with.
PUBLISHED: dict[str, Part] = {
    "image-prompt": Part(
        "a context that each image shifts (CoCoOp); cannot be exported",
        "prompt",
        f"{_PUBLISHED}.cocoop:ImagePrompt",
        excludes=("mixture", "map", "rows"),
        single_prompt=True,
    ),
    "cluster-prompt": Part(
        "a context behind vectors made of clusters of the classes (TAC)",
        "prompt",
        f"{_PUBLISHED}.tac:ClusterPrompt",
        losses={
            "tac_text": LossTerm(f"{_PUBLISHED}.promptsrc:text_distance", "|t − t⁰| of TAC", 20.0),
            "tac_image": LossTerm(
                f"{_PUBLISHED}.promptsrc:image_distance", "|f − f⁰| of TAC", 25.0
            ),
        },
        average=f"{_PUBLISHED}.tac:equal",
        single_prompt=True,
    ),
    "kgcoop": Part(
        "keeps class embeddings near the hand-written ones (KgCoOp)",
        losses={"kgcoop": LossTerm(f"{_PUBLISHED}.kgcoop:distance", "‖t − t⁰‖² of KgCoOp", 8.0)},
    ),
    "prograd": Part(
        "no step against what the hand-written prompt knows (ProGrad)",
        guide=f"{_PUBLISHED}.prograd:general_knowledge",
    ),
    "first-prompts": Part(
        "free tokens in the first blocks of the visual tower (IVLP)",
        "visual",
        f"{_PUBLISHED}.ivlp:FirstPrompts",
    ),
    "coupled-prompts": Part(
        "visual tokens that are linear maps of the text context (MaPLe)",
        "visual",
        f"{_PUBLISHED}.maple:CoupledPrompts",
        single_prompt=True,
    ),
    "promptsrc": Part(
        "three regularisers that keep prompts near the frozen model (PromptSRC)",
        losses={
            "src_text": LossTerm(f"{_PUBLISHED}.promptsrc:text_distance", "|t − t⁰|", 25.0),
            "src_image": LossTerm(f"{_PUBLISHED}.promptsrc:image_distance", "|f − f⁰|", 10.0),
            "src_logits": LossTerm(f"{_PUBLISHED}.promptsrc:logit_distance", "KL to zero-shot"),
        },
        average=f"{_PUBLISHED}.promptsrc:gaussian",
    ),
    "text-lora": Part(
        "CLIP-LoRA in the text tower: updates of its attention",
        "prompt",
        f"{_PUBLISHED}.clip_lora:TextLoRA",
        single_prompt=True,
    ),
    "visual-lora": Part(
        "CLIP-LoRA in the visual tower: updates of its attention",
        "visual",
        f"{_PUBLISHED}.clip_lora:VisualLoRA",
    ),
    "text-norms": Part(
        "tuned LayerNorms of the text tower (2SFS)",
        "prompt",
        f"{_PUBLISHED}.two_stages:TextNorms",
        single_prompt=True,
    ),
    "visual-norms": Part(
        "tuned LayerNorms of the whole visual tower (2SFS)",
        "visual",
        f"{_PUBLISHED}.two_stages:VisualNorms",
    ),
    "linear-classifier": Part(
        "rows that are trained from the class embeddings (2SFS)",
        "rows",
        f"{_PUBLISHED}.two_stages:LinearClassifier",
    ),
    "class-means": Part(
        "the mean photo of each class as its row",
        "rows",
        f"{_PUBLISHED}.class_means:ClassMeans",
        closed_form=True,
    ),
    "lp-plus-plus": Part(
        "rows that add to class embeddings of learned weight (LP++)",
        "rows",
        f"{_PUBLISHED}.lp_plus_plus:BlendedRows",
    ),
    "clap": Part(
        "rows that are held near the class embeddings (CLAP)",
        "rows",
        f"{_PUBLISHED}.clap:ConstrainedRows",
    ),
    "taskres": Part(
        "rows that add a residual to the class embeddings (TaskRes)",
        "rows",
        f"{_PUBLISHED}.taskres:ResidualRows",
    ),
    "tip-adapter": Part(
        "a cache of the training photos (Tip-Adapter); cannot be exported",
        "rows",
        f"{_PUBLISHED}.tip_adapter:Cache",
        closed_form=True,
        excludes=("mixture",),
    ),
    "tip-adapter-f": Part(
        "the same with trained keys (Tip-Adapter-F); cannot be exported",
        "rows",
        f"{_PUBLISHED}.tip_adapter:TunedCache",
        excludes=("mixture",),
    ),
    "distillation": Part(
        "learns a teacher's answers to photos without labels (PromptKD)",
        "prompt",
        f"{_PUBLISHED}.promptkd:TeacherTexts",
        losses={
            "distillation": LossTerm(
                f"{_PUBLISHED}.promptkd:divergence",
                "KL from the teacher (PromptKD)",
                1000.0,
                replaces="cross_entropy",
            )
        },
        needs=("teacher",),
        # it learns from photos whose labels nobody knows, by the frozen tower
        excludes=(
            *("colours", "text-prompts", "map", "mixture", "zs-norm"),
            *("rows", "linear-classifier", "class-means", "lp-plus-plus", "clap", "taskres"),
            *("tip-adapter", "tip-adapter-f", "adapter", "sample-experts", "visual-prompts"),
            *("lora", "layer-norm", "first-prompts", "coupled-prompts", "visual-lora"),
            "visual-norms",
        ),
        single_prompt=True,
    ),
    "zs-norm": Part(
        "cross-entropy of logits in the range of the zero-shot ones (ZS-Norm)",
        losses={
            "zs_norm": LossTerm(
                f"{_PUBLISHED}.zs_norm:normalised_cross_entropy",
                "cross-entropy of ZS-Norm (arXiv 2407.13588)",
                replaces="cross_entropy",
            )
        },
    ),
}
PARTS: dict[str, Part] = {**OWN, **PUBLISHED}
# Short names for parts that belong together.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "tcpt": ("margin", "moments"),
    "bank": ("infonce", "retrieval"),
    "experts": ("semantic-experts", "sample-experts"),
    "visual": tuple(name for name, part in OWN.items() if part.side == "visual"),
    "deep-prompts": ("text-prompts", "visual-prompts"),
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
