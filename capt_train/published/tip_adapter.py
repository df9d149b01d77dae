"""Tip-Adapter (arXiv 2207.09519): a cache of the training photos beside the class embeddings."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from capt_train.method.class_rows import ClassRows, RowPart, RowTask
from capt_train.published.minibatches import Schedule, minimise

_ALPHA, _BETA = 1.0, 5.5
_SEARCHED = 20  # values of each of the two, up to 3 and 7; the authors try more of β
_EPOCHS, _BATCH_SIZE, _RATE = 20, 256, 0.001


class Cache(RowPart):
    """`z = scale·f·t + α·exp(−β(1 − f·Fᵀ))·L`, eq. 5: F are the photos, L their classes.

    α and β are searched on validation photos where there are any. The authors average each photo
    over ten augmented copies.
    """

    folds = False
    keys: Tensor  # F, (photos, dim)
    values: Tensor  # L, (photos, tuned)
    strength: Tensor  # α and β

    def __init__(self, classes: Sequence[int], dim: int) -> None:
        """Make an empty cache."""
        super().__init__(classes, dim)
        self.register_buffer("keys", torch.zeros(0, dim))
        self.register_buffer("values", torch.zeros(0, len(self.classes)))
        self.register_buffer("strength", torch.tensor([_ALPHA, _BETA]))

    def fit(self, task: RowTask) -> None:
        """Take the photos, tune their keys if the method does, and search α and β."""
        self.keys = task.images.clone()
        self.values = functional.one_hot(task.labels, len(self.classes)).to(task.images)
        self._tune_keys(task)
        self._search(task)

    def applied(self, rows: ClassRows, classes: Sequence[int], scale: float) -> ClassRows:
        """Return the class rows as they are."""
        return rows

    def added(
        self, images: Float[Tensor, "batch dim"], classes: Sequence[int], scale: float
    ) -> Float[Tensor, "batch classes"]:
        """Return what the cache adds to the logits of the classes that have photos."""
        targets, sources = self.places(classes)
        logits = images.new_zeros(len(images), len(classes))
        alpha, beta = self.strength
        logits[:, targets] = self._cached(images, alpha, beta)[:, sources].to(logits)
        return logits

    def _cached(
        self, images: Tensor, alpha: Tensor | float, beta: Tensor | float
    ) -> Float[Tensor, "batch tuned"]:
        return alpha * torch.exp(-beta * (1 - images @ self.keys.T)) @ self.values

    def _tune_keys(self, task: RowTask) -> None:
        """Leave the keys as they are."""

    def _search(self, task: RowTask) -> None:
        if not len(task.val_labels):
            return
        known = task.scale * task.val_images @ task.texts.T
        steps = [(number + 1) / _SEARCHED for number in range(_SEARCHED)]
        best = -1.0
        for share, sharpness in product(steps, steps):
            alpha, beta = 3.0 * share, 7.0 * sharpness
            logits = known + self._cached(task.val_images, alpha, beta)
            right = float((logits.argmax(dim=1) == task.val_labels).double().mean())
            if right > best:
                best = right
                self.strength.copy_(torch.tensor([alpha, beta]))

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("keys", "values"):  # whose length is the number of photos
            if (stored := state.get(f"{prefix}{name}")) is not None:
                setattr(self, name, torch.zeros_like(stored).to(self.strength))
        super()._load_from_state_dict(state, prefix, *rest)


class TunedCache(Cache):
    """Tip-Adapter-F: the keys are trained by AdamW for 20 epochs."""

    def _tune_keys(self, task: RowTask) -> None:
        keys = self.keys = nn.Parameter(self.keys)
        optimizer = torch.optim.AdamW([keys], _RATE, eps=1e-4)

        def logits(images: Tensor) -> tuple[Tensor, None]:
            known = task.scale * images @ task.texts.T
            return known + self._cached(images, _ALPHA, _BETA), None

        batches = -(-len(task.labels) // _BATCH_SIZE)
        minimise(optimizer, logits, task, Schedule(_BATCH_SIZE, _EPOCHS * batches))
        del self.keys
        self.register_buffer("keys", keys.detach())
