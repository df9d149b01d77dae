"""Read arrays back from a bundle, checked before anything is computed from them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
_KINDS = {"f": "float(s)", "i": "integer(s)", "b": "boolean(s)"}


def read_array(arrays: Arrays, name: str, kind: str, length: int | None = None) -> NDArray[Any]:
    """Return an array that has one axis, is not empty, and is finite.

    Args:
        arrays: by name.
        name: of the array.
        kind: "f", "i" or "b", as in `numpy.dtype.kind`.
        length: that the array must have; by default any but 0.

    Raises:
        ValueError: the array is missing, or has another kind or shape.
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
