"""Drawing of one pictogram, 64 x 64 px, with numpy and Pillow."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .vocabulary import COLOURS, Spec, parse

SIZE = 64
Array = NDArray[np.floating[Any]]

_AXIS = np.arange(SIZE, dtype=np.float32) + 0.5
_X, _Y = np.meshgrid(_AXIS, _AXIS)
_OVERSAMPLE = 3


def _ellipse(ratio: float, start: float = 0.0, turn: float = 2 * np.pi) -> Array:
    angle = start + np.linspace(0, turn, 48)
    return np.stack([np.cos(angle), ratio * np.sin(angle)], 1)


def _polygon(corners: int, inner: float | None = None) -> Array:
    count = corners if inner is None else 2 * corners
    angle = 2 * np.pi * np.arange(count) / count
    radius = np.ones(count)
    if inner is not None:
        radius[1::2] = inner
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)


def _band(rng: np.random.Generator, gap: float) -> Array:
    """Return the outline of a ring of unit outer radius, open over `gap` radians."""
    outer = _ellipse(1.0, np.pi / 2 + gap / 2, 2 * np.pi - gap)
    return np.concatenate([outer, outer[::-1] * rng.uniform(0.45, 0.62)])


def _outline(shape: str, rng: np.random.Generator) -> Array:
    """Return corners (n, 2) of a shape of about unit radius, a little turned and stretched."""
    makers: dict[str, Callable[[], Array]] = {
        "circle": lambda: _ellipse(rng.uniform(0.9, 1.0)),
        "oval": lambda: _ellipse(rng.uniform(0.62, 0.8)),
        "square": lambda: 1.1 * _polygon(4) @ _rotation(np.pi / 4),
        "diamond": lambda: 1.1 * _polygon(4) * (rng.uniform(0.6, 0.8), 1.0),
        "pentagon": lambda: _polygon(5),
        "hexagon": lambda: _polygon(6),
        "five point star": lambda: 1.1 * _polygon(5, rng.uniform(0.4, 0.52)),
        "six point star": lambda: 1.1 * _polygon(6, rng.uniform(0.45, 0.57)),
        "ring": lambda: _band(rng, 0.0),
        "horseshoe": lambda: _band(rng, rng.uniform(0.7, 1.5)),
    }
    # A square on its corner would be a diamond, so no figure turns far.
    tilt = rng.uniform(-0.4, 0.4)
    stretch = np.array([[1.0, rng.uniform(-0.1, 0.1)], [0.0, rng.uniform(0.92, 1.0)]])
    corners: Array = makers[shape]() @ stretch @ _rotation(tilt)
    return corners


def _rotation(angle: float) -> Array:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _pattern(pattern: str, rng: np.random.Generator) -> Array | float:
    """Return the share of the second tone at each pixel, (64, 64) in [0, 1]."""
    turn, period = rng.uniform(0, np.pi), rng.uniform(6.0, 8.5)
    u = _X * np.cos(turn) + _Y * np.sin(turn) + rng.uniform(0, 20)
    v = _Y * np.cos(turn) - _X * np.sin(turn) + rng.uniform(0, 20)
    if pattern == "plain":
        return 0.0
    if pattern == "wavy":
        u = u + rng.uniform(1.2, 2.4) * np.sin(2 * np.pi * v / rng.uniform(9, 14))
    if pattern in ("striped", "wavy"):
        wave = np.sin(2 * np.pi * u / period)
    else:
        period *= 1.25
        wave = np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period)
        if pattern == "dotted":
            # Only every second field of the board carries a mark, and it is round.
            u, v = u % period - period / 2, v % period - period / 2
            wave = 2.0 * (1.0 - np.sqrt(u * u + v * v) / (0.32 * period))
    share: Array = np.clip(0.5 + 1.6 * wave, 0.0, 1.0)
    return share


def _tone(rng: np.random.Generator, colour: str) -> Array:
    hue, jitter, low, high = COLOURS[colour]
    shade = (hue + rng.uniform(-jitter, jitter)) % 360 / 360
    return np.array(colorsys.hsv_to_rgb(shade, rng.uniform(low, high), rng.uniform(0.7, 1.0)))


def _background(rng: np.random.Generator) -> Array:
    """Return a muted gradient with a few faint strokes and spots, (64, 64, 3) in [0, 1]."""
    level = rng.uniform(0.12, 0.9)
    ends = np.clip(level + rng.uniform(-0.15, 0.15, (2, 3)), 0, 1).astype(np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + ((_X - 32) * np.cos(turn) + (_Y - 32) * np.sin(turn)) / 90
    field = ends[0] + ramp[..., None] * (ends[1] - ends[0])
    picture = Image.fromarray(np.uint8(255 * np.clip(field, 0, 1)))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(2, 7)):
        x, y, dx, dy = (float(value) for value in rng.uniform((0, 0, -30, -30), (64, 64, 30, 30)))
        grey = np.clip(level + rng.uniform(-0.2, 0.2, 3), 0, 1) * 255
        ink = (int(grey[0]), int(grey[1]), int(grey[2]))
        if rng.random() < 0.6:
            draw.line((x, y, x + dx, y + dy), ink, int(rng.integers(1, 4)))
        else:
            draw.ellipse((x, y, x + abs(dx) / 2, y + abs(dy) / 2), ink)
    return np.asarray(picture, np.float32) / 255


def _marks(picture: Image.Image, rng: np.random.Generator) -> None:
    """Draw small bright distractors near the edge and, at times, a thin bar across."""
    draw = ImageDraw.Draw(picture)
    names = list(COLOURS)
    for _ in range(rng.integers(0, 4)):
        red, green, blue = (int(255 * v) for v in _tone(rng, names[rng.integers(len(names))]))
        angle, size = rng.uniform(0, 2 * np.pi), rng.uniform(2, 4)
        x, y = 32 + 30 * np.cos(angle), 32 + 30 * np.sin(angle)
        draw.regular_polygon((x, y, size), int(rng.integers(3, 7)), 0, (red, green, blue))
    if rng.random() < 0.25:
        ends = rng.uniform(0, 64, 4)
        ink = (int(rng.integers(30, 220)),) * 3
        draw.line((float(ends[0]), 0, float(ends[1]), 64), ink, int(rng.integers(1, 4)))


def render(what: str | Spec, rng: np.random.Generator) -> Image.Image:
    """Draw one RGB picture, 64 x 64 px, of a class name or a spec.

    Pose, tones, background, marks, blur and noise come from `rng` alone, so the same generator
    state gives the same picture. Raises ValueError for a name that is not of this world.
    """
    spec = parse(what) if isinstance(what, str) else what
    radius = rng.uniform(17, 25)
    centre = 32 + rng.uniform(-1, 1, 2) * (29 - radius)
    corners = (_outline(spec.shape, rng) * radius + centre) * _OVERSAMPLE
    stencil = Image.new("L", (SIZE * _OVERSAMPLE,) * 2)
    ImageDraw.Draw(stencil).polygon([(float(x), float(y)) for x, y in corners], 255)
    mask = np.asarray(stencil.reduce(_OVERSAMPLE), np.float32)[..., None] / 255
    tone = _tone(rng, spec.colour)
    dark, amount = rng.random() < 0.5, rng.uniform(0.6, 0.8)
    second = tone * (1 - amount) if dark else tone + (1 - tone) * amount
    share = np.broadcast_to(_pattern(spec.pattern, rng), (SIZE, SIZE))[..., None]
    figure = np.float32(tone) + share * np.float32(second - tone)
    field = _background(rng)
    field = field + mask * (figure - field)
    picture = Image.fromarray(np.uint8(255 * np.clip(field, 0, 1)))
    _marks(picture, rng)
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.0)))
    light = np.float32(rng.uniform(0.88, 1.06, 3) * rng.uniform(0.8, 1.05))
    noise = rng.standard_normal((SIZE, SIZE, 3), np.float32) * np.float32(rng.uniform(2, 11))
    return Image.fromarray(np.uint8(np.clip(np.asarray(picture) * light + noise, 0, 255)))
