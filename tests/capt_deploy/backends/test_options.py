import pytest

from capt_deploy.backends.options import RuntimeOptions, batch_buckets
from capt_deploy.core.errors import ConfigError


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ((1, 8, 32), (1, 2, 4, 8, 16, 32)),
        ((1, 1, 1), (1,)),
        ((2, 6, 20), (2, 4, 6, 8, 16, 20)),
        ((8, 8, 64), (8, 16, 32, 64)),
        ((2, 5, 9), (2, 4, 5, 8, 9)),
    ],
)
def test_buckets_double_up_to_the_largest_batch(batches: tuple, expected: tuple[int, ...]) -> None:
    assert batch_buckets(*batches) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"device": -1},
        {"threads": 0},
        {"batches": (0, 8, 32)},
        {"batches": (4, 2, 32)},
        {"batches": (1, 16, 8)},
        {"batches": (1, 2)},
    ],
)
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: expected"):
        RuntimeOptions(**options)
