"""Arrays read back from a bundle: each is checked before anything is computed from it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
_KINDS = {"f": "float(s)", "i": "integer(s)", "b": "boolean(s)"}


def vector(arrays: Arrays, name: str, kind: str, length: int | None = None) -> NDArray[Any]:
    """Return one array of `arrays`, of one axis, not empty, and finite.

    Args:
        arrays: by name.
        name: which of them.
        kind: "f", "i" or "b", as in `numpy.dtype.kind`.
        length: what it must be; any but 0 by default.

    Raises:
        ValueError: it is missing, or is something else.
    """
    if name not in arrays:
        raise ValueError(f"expected an array {name!r}, came {sorted(arrays)}")
    array = arrays[name]
    fits = array.ndim == 1 and array.dtype.kind == kind and len(array) == (length or len(array))
    if not fits or not len(array):
        raise ValueError(
            f"{name}: expected {length or 'at least one'} {_KINDS[kind]} on one axis, "
            f"came {array.dtype} {array.shape}"
        )
    if kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, came NaN or infinity")
    return array
