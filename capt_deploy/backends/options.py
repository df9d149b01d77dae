"""Options of a backend: which GPU, how many threads, and how many images at once."""

from dataclasses import dataclass
from pathlib import Path

from capt_deploy.core.errors import ConfigError

BATCHES = (1, 8, 32)  # the smallest, usual and largest number of images that run at once
PORTABLE = ("hardware", "version")  # what may differ where a TensorRT engine runs


@dataclass(frozen=True)
class RuntimeOptions:
    """How a backend uses the machine. Each backend reads the options that concern it."""

    device: int = 0  # CUDA ordinal
    threads: int | None = None  # of a backend on the CPU; None: the cores this process may use
    batches: tuple[int, int, int] = BATCHES
    cuda_graphs: bool = True  # capture one graph for each batch size
    cache_folder: Path | None = None  # of engines; None: the user's cache folder

    def __post_init__(self) -> None:
        if self.device < 0:
            raise ConfigError(f"device: expected the number of a GPU from 0 on, came {self.device}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads: expected at least 1, came {self.threads}")
        check_batches(self.batches)


def check_batches(batches: tuple[int, ...]) -> None:
    """Check that `batches` are a smallest, a usual and a largest number of images.

    Raises:
        ConfigError: they are not three rising numbers from 1 on.
    """
    if len(batches) != 3 or not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise ConfigError(f"batches: expected smallest ≤ usual ≤ largest from 1 on, came {batches}")


def batch_buckets(smallest: int, usual: int, largest: int) -> tuple[int, ...]:
    """Return the batch sizes to prepare: these three, and the powers of two between them.

    A batch runs in the smallest bucket that holds it, so close buckets waste little work.
    """
    powers = {2**power for power in range(largest.bit_length()) if smallest < 2**power < largest}
    return tuple(sorted(powers | {smallest, usual, largest}))


DEFAULT_OPTIONS = RuntimeOptions()
