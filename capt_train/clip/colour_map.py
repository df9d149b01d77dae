"""An affine map of the colours of normalised pixels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ColourMap:
    """`x ← A·x + b` on the three channels of every normalised pixel."""

    matrix: Float[Tensor, "3 3"]  # A
    offset: Float[Tensor, "3"]  # b

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return the images with mapped colours."""
        mixed = torch.einsum("ij,bjhw->bihw", self.matrix.to(images), images)
        return mixed + self.offset.to(images)[:, None, None]

    @property
    def size(self) -> int:
        """Return the number of fitted values."""
        return self.matrix.numel() + self.offset.numel()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"matrix": self.matrix.tolist(), "offset": self.offset.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ColourMap":
        """Read the JSON form.

        Raises:
            TypeError, KeyError, ValueError: values of wrong form.
        """
        # With a type given, null and the like are TypeErrors rather than RuntimeErrors.
        matrix = torch.tensor(values["matrix"], dtype=torch.float32)
        offset = torch.tensor(values["offset"], dtype=torch.float32)
        if (matrix.shape, offset.shape) != ((3, 3), (3,)):
            raise ValueError(f"expected 3×3 and 3 numbers, came {matrix.shape}, {offset.shape}")
        if not (torch.isfinite(matrix).all() and torch.isfinite(offset).all()):
            raise ValueError("expected finite numbers")
        return cls(matrix, offset)
