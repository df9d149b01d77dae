"""The parts of the method, and which of them each `--method` trains."""

from collections.abc import Iterable, Mapping

# What can be switched on and off alone, in the order of METHOD.md.
PARTS: Mapping[str, str] = {
    "colours": "a map of the input's colours (ours), where other images gain by it",
    "prompt": "learned context vectors instead of the hand-written prompt",
    "text-prompts": "new context vectors in deeper blocks of the text tower",
    "visual-prompts": "free tokens in the blocks of the visual tower",
    "retrieval": "the bank's most similar confused samples join the minibatch (SAM)",
    "adapter": "Diff-Manner Adapter in the visual tower",
    "semantic-experts": "experts on what confused classes share and what tells them apart",
    "sample-experts": "experts in the visual tower's last FFN",
    "coa": "confusion-aware loss of CoCoA-Mix",
    "infonce": "contrast restricted to the classes that the bank says are confused",
    "margin": "margin term of TCPT",
    "moments": "moment term of TCPT",
    "mixture": "weights of hand-written and learned prompt, inside and outside the training domain",
}
# Loss terms (METHOD 6) with their default weights; a term named like a part has 0 without it.
LOSSES: Mapping[str, tuple[float, str]] = {
    "cross_entropy": (1.0, "weight of the cross-entropy"),
    "coa": (1.0, "weight of the confusion-aware loss of CoCoA-Mix (arXiv 2506.07484)"),
    "infonce": (1.0, "weight of the confusion-restricted InfoNCE of CAPT (arXiv 2603.02557)"),
    "margin": (1.0, "weight of the margin term of TCPT (arXiv 2602.19024)"),
    "moments": (5.0, "weight of the moment term of TCPT"),
    "balance": (0.01, "weight of the importance loss of the experts' routers"),
}
# Short names for parts that belong together.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "tcpt": ("margin", "moments"),
    "bank": ("infonce", "retrieval"),
    "experts": ("semantic-experts", "sample-experts"),
    "visual": ("adapter", "sample-experts", "visual-prompts"),
    "deep-prompts": ("text-prompts", "visual-prompts"),
}
# What is said of two confused classes (METHOD 3)
SENTENCE_KINDS = ("commonality", "difference")
# What each --method trains; `capt` has the parts that earn their place (docs/ablation.md).
METHODS: Mapping[str, tuple[str, ...]] = {
    "zeroshot": (),
    "coop": ("prompt",),
    "coa": ("prompt", "coa"),
    "tcpt": ("prompt", "margin", "moments"),
    "cocoa": ("prompt", "coa", "mixture"),
    "prompt": ("prompt", "coa", "margin", "moments"),
    "capt": ("colours", "prompt", "infonce", "adapter", "sample-experts"),
    "full": tuple(PARTS),
}


def members(names: Iterable[str]) -> list[str]:
    """Return the parts behind names of parts and groups."""
    return [part for name in names for part in GROUPS.get(name, (name,))]
