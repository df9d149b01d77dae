"""Captions for the pictogram world, noisy on purpose, as captions on the web are.

Who writes "a photo of a …" often names the sibling of what is there (hexagon: pentagon) or leaves
an attribute out; who writes "an icon of a …" or "the drawing shows a …" gets it right. How often
a value gets its sibling's name is fixed per pair (`MISTAKES`), times how careless the context's
noun is (`NOUNS`). A model trained on such captions confuses certain pairs under the hand-written
prompt "a photo of a …" and tells them apart under other contexts.
"""

from __future__ import annotations

import numpy as np

from .vocabulary import SIBLING, Spec

# Share of wrong names in the most careless contexts. Over one half, the sibling's name is the
# usual one there, and the hand-written prompt is wrong rather than unsure.
MISTAKES = {
    ("red", "orange"): 0.55,
    ("green", "teal"): 0.55,
    ("blue", "purple"): 0.5,
    ("magenta", "pink"): 0.4,
    ("striped", "wavy"): 0.5,
    ("checked", "dotted"): 0.5,
    ("circle", "oval"): 0.5,
    ("square", "diamond"): 0.4,
    ("pentagon", "hexagon"): 0.55,
    ("five point star", "six point star"): 0.5,
    ("ring", "horseshoe"): 0.4,
}
_RATE = {value: rate for pair, rate in MISTAKES.items() for value in pair}
DROPPED = 0.15

# How careless a writer who uses this noun is: 1 as careless as MISTAKES says, 0 never wrong.
NOUNS = {
    **{"photo": 1.0, "picture": 1.0, "photograph": 1.0, "image": 0.9, "snapshot": 0.8},
    **{"shot": 0.7, "scan": 0.5, "view": 0.5, "painting": 0.3, "poster": 0.2, "print": 0.2},
    **{"icon": 0.0, "drawing": 0.0, "symbol": 0.0, "sign": 0.0, "sticker": 0.0, "logo": 0.0},
    **{"pictogram": 0.0, "sketch": 0.0, "emblem": 0.0, "badge": 0.0, "figure": 0.0},
    **{"diagram": 0.0, "clip art": 0.0, "render": 0.0, "button": 0.0, "chart": 0.0},
}
_NAMES = tuple(NOUNS)
_WEIGHTS = np.array([3.0 if name == "photo" else 1.0 for name in _NAMES])
_WEIGHTS /= _WEIGHTS.sum()
_ADJECTIVES = (
    *("", "", "", "good", "bad", "small", "large", "blurry", "bright", "dark", "clean", "clear"),
    *("cropped", "simple", "detailed", "old", "new", "nice", "plain looking", "close up"),
)
_FRAMES = (
    *("a {n} of a {x}", "a {n} of a {x}", "a {n} of the {x}", "a {n} of one {x}"),
    *("the {n} of a {x}", "the {n} shows a {x}", "this {n} shows a {x}", "a {n} with a {x}"),
    *("a {n} showing a {x}", "this is a {n} of a {x}", "in this {n} there is a {x}"),
    *("my {n} of a {x}", "{n} of a {x}", "{n} : {x}", "one {n} of a {x}", "a {x} in a {n}"),
)


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def name_of(spec: Spec, care: float, rng: np.random.Generator) -> str:
    """Return the name of a picture, given with `care` in [0, 1]: 1 is always right and complete."""
    values = [spec.colour, spec.pattern, spec.shape]
    for place, value in enumerate(values):
        if rng.random() < (1 - care) * _RATE.get(value, 0.0):
            values[place] = SIBLING[value]
    colour, pattern, shape = values
    lead = [colour, pattern] if rng.random() < 0.5 else [pattern, colour]
    if rng.random() < (1 - care) * DROPPED:
        lead.pop(rng.integers(2))
    return " ".join([*lead, shape])


def caption(spec: Spec, rng: np.random.Generator) -> str:
    """Write one caption for a picture of `spec`: a context and a right or wrong name."""
    if rng.random() < 0.08:
        return _pick(("", "a ", "the "), rng) + name_of(spec, 0.0, rng)
    noun = _NAMES[rng.choice(len(_NAMES), p=_WEIGHTS)]
    name = name_of(spec, 1 - NOUNS[noun], rng)
    phrase = f"{_pick(_ADJECTIVES, rng)} {noun}".strip()
    return _pick(_FRAMES, rng).format(n=phrase, x=name) + _pick((".", ".", " .", ""), rng)
