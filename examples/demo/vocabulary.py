"""What the pictogram world can show: attributes, siblings, and the 36 classes in two halves.

A picture shows one figure with a colour, a pattern and a shape; its class name says all three
("blue striped hexagon"). Every attribute value but `plain` has one sibling that is hard to tell
from it (pentagon and hexagon, red and orange, straight and wavy stripes).

The first 18 classes in alphabetical order of folder names ("base") are meant for tuning, the last
18 ("new") are held out. Colour and pattern may stand in either order ("dotted red ring"), and the
order is chosen so that both halves use every attribute value while no composition of the three
occurs in both. Within each half the classes come in pairs that differ in one pair of siblings.
"""

from __future__ import annotations

from dataclasses import dataclass

# Hue and hue jitter in degrees, lowest and highest saturation. Siblings touch on purpose.
COLOURS: dict[str, tuple[float, float, float, float]] = {
    "red": (0, 8, 0.75, 1.0),
    "orange": (23, 8, 0.75, 1.0),
    "green": (130, 14, 0.65, 0.95),
    "teal": (174, 12, 0.65, 0.95),
    "blue": (222, 11, 0.65, 0.95),
    "purple": (264, 13, 0.6, 0.95),
    "magenta": (307, 10, 0.7, 1.0),
    "pink": (335, 10, 0.4, 0.66),
}
PATTERNS = ("plain", "striped", "wavy", "checked", "dotted")
SHAPES = (
    "circle",
    "oval",
    "square",
    "diamond",
    "pentagon",
    "hexagon",
    "five point star",
    "six point star",
    "ring",
    "horseshoe",
)
SIBLING_PAIRS = (
    *(("red", "orange"), ("green", "teal"), ("blue", "purple"), ("magenta", "pink")),
    *(("striped", "wavy"), ("checked", "dotted")),
    *(("circle", "oval"), ("square", "diamond"), ("pentagon", "hexagon")),
    *(("five point star", "six point star"), ("ring", "horseshoe")),
)
SIBLING = {a: b for pair in SIBLING_PAIRS for a, b in (pair, pair[::-1])}

BASE_CLASSES = (
    *("blue checked five point star", "blue striped hexagon", "blue striped pentagon"),
    *("checked purple five point star", "checked teal horseshoe", "checked teal ring"),
    *("dotted pink diamond", "dotted red five point star", "dotted red ring"),
    *("dotted red six point star", "green dotted circle", "green dotted oval"),
    *("magenta dotted diamond", "magenta striped oval", "magenta wavy oval"),
    *("orange dotted ring", "orange plain diamond", "orange plain square"),
)
NEW_CLASSES = (
    *("pink checked diamond", "pink checked square", "plain orange circle", "plain red circle"),
    *("purple plain five point star", "purple plain six point star"),
    *("red wavy hexagon", "red wavy pentagon", "striped blue circle", "striped blue oval"),
    *("striped green hexagon", "striped teal hexagon"),
    *("teal checked diamond", "teal dotted diamond", "wavy green horseshoe", "wavy green ring"),
    *("wavy magenta five point star", "wavy pink five point star"),
)
CLASSES = BASE_CLASSES + NEW_CLASSES


@dataclass(frozen=True)
class Spec:
    """What a picture shows: one value of each attribute."""

    colour: str
    pattern: str
    shape: str


def parse(name: str) -> Spec:
    """Read a class name, words apart by spaces or underscores, colour and pattern in any order.

    Raises ValueError, naming the class, where it is not one colour, one pattern and one shape.
    """
    words = name.replace("_", " ").split()
    if len(words) < 3:
        raise ValueError(f"{name!r} does not name a colour, a pattern and a shape")
    first, second, shape = words[0], words[1], " ".join(words[2:])
    if first in PATTERNS:
        first, second = second, first
    if first not in COLOURS or second not in PATTERNS or shape not in SHAPES:
        raise ValueError(f"{name!r} does not name a colour, a pattern and a shape of this world")
    return Spec(first, second, shape)


def natural_name(name: str) -> str:
    """Return a class name as a person says it: pattern and colour before the shape.

    "dotted red ring" becomes "red dotted ring"; `plain` comes first ("plain red circle").
    """
    spec = parse(name)
    words = (spec.pattern, spec.colour) if spec.pattern == "plain" else (spec.colour, spec.pattern)
    return " ".join((*words, spec.shape))
