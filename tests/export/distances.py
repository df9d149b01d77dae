"""DAC written out again, text by text and image by image."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capt_train.run.folder import TunedModel


def factor_by_hand(row: Tensor, hand_written: Tensor, rows: Tensor, hand_rows: Tensor) -> float:
    """Return γ of a class that was not tuned on, from its texts and those of classes that were."""

    def closeness(text: Tensor, others: Tensor) -> float:
        apart = sorted(math.dist(text / text.norm(), own / own.norm()) for own in others)[:5]
        return math.exp(-sum(apart) / len(apart))

    return closeness(row, rows) / closeness(hand_written, hand_rows)


def factors_by_hand(model: TunedModel) -> list[float]:
    tuned = torch.tensor(model.tuned)
    known = model.class_rows.rows[tuned], model.zero_shot[tuned]
    texts = zip(model.tuned, model.class_rows.rows, model.zero_shot, strict=True)
    return [1.0 if flag else factor_by_hand(*own, *known) for flag, *own in texts]


def adjusted(logits: NDArray[np.float32], factors: list[float]) -> NDArray[np.float64]:
    """Return the definition of DAC, image by image."""
    return np.array([[factors[int(np.argmax(row))] * z for z in row] for row in logits])


def coloured_noise(count: int = 200) -> NDArray[np.uint8]:
    """Return images of many kinds, for which every class is the most probable one somewhere."""
    random = np.random.default_rng(0)
    means = random.uniform(0, 255, (count, 1, 1, 3))
    spread = random.uniform(0, 120, (count, 1, 1, 1))
    pixels = means + spread * random.normal(size=(count, 16, 16, 3))
    return pixels.clip(0, 255).astype(np.uint8)
