"""The embedded held-out images of a run, kept for the export.

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


@dataclass(frozen=True)
class Validation:
    """Images of the tuned classes, embedded by the tuned model.

    Validation images: no step was taken on them; the best epoch, colours, κ and the calibration
    were chosen by them. Without any, training images with out-of-fold logits.
    """

    embeddings: Float[Tensor, "samples dim"]  # unit norm
    labels: Int[Tensor, " samples"]  # indices of all class names
    # Scaled logits over the tuned classes by models that had not seen the image; None where the
    # run's own model had not
    logits: Float[Tensor, "samples tuned"] | None = None

    def fits(self, dim: int, tuned: Sequence[int]) -> bool:
        """Tell whether embeddings and labels fit a run's dimensions and tuned classes."""
        known = torch.isin(self.labels, torch.tensor(list(tuned)))
        columns = len(tuned) if self.logits is None else self.logits.shape[1]
        return self.embeddings.shape[1] == dim and bool(known.all()) and columns == len(tuned)

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        write_bytes(path, save({name: t.contiguous().cpu() for name, t in tensors.items()}))

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
            embeddings, labels, logits = (
                values["embeddings"],
                values["labels"],
                values.get("logits"),
            )
        except (OSError, SafetensorError, KeyError) as cause:
            raise RunError(f"{path}: damaged ({cause!r}); restore it, or delete it") from cause
        fits = embeddings.ndim == 2 and embeddings.dtype == torch.float32
        fits &= labels.shape == embeddings.shape[:1] and labels.dtype == torch.long
        if logits is not None:
            fits &= (
                logits.ndim == 2 and len(logits) == len(labels) and bool(logits.isfinite().all())
            )
        if not fits or not embeddings.isfinite().all() or (labels < 0).any():
            raise RunError(f"{path}: not as capt-train writes it; restore it, or delete it")
        return cls(embeddings, labels, logits)
