"""Run a backend once before it is trusted: what loads need not run."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from capt_deploy.backends import Outputs
from capt_deploy.core.errors import BackendError


def probe(
    name: str,
    run: Callable[[NDArray[np.uint8]], Outputs],
    pixels: tuple[int, ...],
    batches: tuple[int, int, int],
) -> None:
    """Run the smallest and the largest batch, which need least and most of the GPU.

    Args:
        name: of the backend.
        run: takes (batch, height, width, 3) pixels.
        pixels: height, width, 3.
        batches: smallest, usual, largest.

    Raises:
        BackendError: it does not run, or what it says is no number.
    """
    for size in sorted({batches[0], batches[-1]}):
        outputs = run(np.zeros((size, *pixels), np.uint8))
        if not all(np.isfinite(column).all() for column in outputs):
            raise BackendError(f"backend {name}: a probe of {size} images gave no number")
