"""How many images are run at once: what one may ask for, and the sizes that are prepared."""

from capt_deploy.core.errors import BackendError, CaptError

BATCHES = (1, 8, 32)  # smallest, usual and largest number of images that an engine takes


def check_batches(batches: tuple[int, ...], error: type[CaptError] = BackendError) -> None:
    """Check what a backend is asked to take.

    Raises:
        error: it is not a smallest, a usual and a largest batch.
    """
    if len(batches) != 3 or not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise error(f"batches: expected smallest ≤ usual ≤ largest from 1 on, came {batches}")


def buckets(smallest: int, usual: int, largest: int) -> tuple[int, ...]:
    """Return the batches to prepare: the three, and powers of two, so that little is wasted."""
    sizes = {smallest, usual, largest}
    sizes |= {2**power for power in range(largest.bit_length()) if smallest < 2**power < largest}
    return tuple(sorted(sizes))
