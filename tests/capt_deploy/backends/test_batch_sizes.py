"""Which batches are prepared."""

import pytest

from capt_deploy.backends.batch_sizes import buckets


@pytest.mark.parametrize(
    ("three", "sizes"),
    [
        ((1, 8, 32), (1, 2, 4, 8, 16, 32)),
        ((1, 1, 1), (1,)),
        ((2, 6, 20), (2, 4, 6, 8, 16, 20)),
        ((8, 8, 64), (8, 16, 32, 64)),
    ],
)
def test_batch_sizes_waste_little(three, sizes):
    assert buckets(*three) == sizes


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ((1, 8, 32), (1, 2, 4, 8, 16, 32)),
        ((1, 1, 1), (1,)),
        ((2, 5, 9), (2, 4, 5, 8, 9)),
        ((16, 16, 16), (16,)),
    ],
)
def test_buckets_double_up_to_the_largest(batches: tuple, expected: tuple[int, ...]) -> None:
    assert buckets(*batches) == expected
