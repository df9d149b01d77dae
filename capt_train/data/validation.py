"""The embedded validation images of a run, kept for the export.

Conformal sets, rejection and familiarity depend on the classes of a bundle, which are known only
when it is exported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from capt_deploy.core.errors import RunError
from capt_deploy.core.files import write_bytes

VALIDATION = "validation.safetensors"
_NAMES = ("embeddings", "labels")


@dataclass(frozen=True)
class Validation:
    """Images of the tuned classes, embedded by the tuned model.

    No step was taken on them; the best epoch, colours, κ and the calibration were chosen by them.
    """

    embeddings: Float[Tensor, "samples dim"]  # unit norm
    labels: Int[Tensor, " samples"]  # indices of all class names

    def fits(self, dim: int, tuned: Sequence[int]) -> bool:
        """Tell whether embeddings and labels fit a run's dimensions and tuned classes."""
        known = torch.isin(self.labels, torch.tensor(list(tuned)))
        return self.embeddings.shape[1] == dim and bool(known.all())

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        write_bytes(path, save({name: getattr(self, name).contiguous().cpu() for name in _NAMES}))

    @classmethod
    def load(cls, path: Path) -> "Validation | None":
        """Read a saved file; None where there is none.

        Raises:
            RunError: the file is damaged or not as capt-train writes it.
        """
        if not path.is_file():
            return None
        try:
            values = load(path.read_bytes())
            embeddings, labels = (values[name] for name in _NAMES)
        except (OSError, SafetensorError, KeyError) as cause:
            raise RunError(f"{path}: damaged ({cause!r}); restore it, or delete it") from cause
        fits = embeddings.ndim == 2 and embeddings.dtype == torch.float32
        fits &= labels.shape == embeddings.shape[:1] and labels.dtype == torch.long
        if not fits or not embeddings.isfinite().all() or (labels < 0).any():
            raise RunError(f"{path}: not as capt-train writes it; restore it, or delete it")
        return cls(embeddings, labels)
