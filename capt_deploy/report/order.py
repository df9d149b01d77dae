"""Which classes a confusion matrix shows, and in which order: confused ones are neighbours."""

import numpy as np
from numpy.typing import NDArray


def confused_order(counts: NDArray[np.int64], most: int) -> list[int]:
    """Return up to `most` classes, such that those that are confused often stand together.

    Starting with every class alone, the two groups that hold the most confused pair are joined, at
    the ends that bring these two closest, and so on with the next pair. Where there are more than
    `most` classes, those of the worst pairs are taken.

    Args:
        counts: (classes, classes) of images, `[true, predicted]`.
        most: classes that can be shown, at least 2.
    """
    both = np.triu(counts + counts.T, 1)
    true, taken = np.nonzero(both)
    worst = np.argsort(-both[true, taken], kind="stable")
    pairs = [(int(true[index]), int(taken[index])) for index in worst]
    if len(counts) > most:
        kept: set[int] = set()
        for pair in pairs:
            if len(kept | set(pair)) <= most:
                kept |= set(pair)
        pairs = [pair for pair in pairs if kept.issuperset(pair)]
    else:
        kept = set(range(len(counts)))
    groups = {index: [index] for index in sorted(kept)}
    for one, other in pairs:
        _join(groups, one, other)
    chains = {id(group): group for group in groups.values()}
    return [index for group in sorted(chains.values(), key=len, reverse=True) for index in group]


def _join(groups: dict[int, list[int]], one: int, other: int) -> None:
    """Make the groups of two classes one, the two as close to each other as can be."""
    first, second = groups[one], groups[other]
    if first is second:
        return
    if first.index(one) < len(first) / 2 - 0.5:
        first = first[::-1]
    if second.index(other) > len(second) / 2 - 0.5:
        second = second[::-1]
    joined = first + second
    for index in joined:
        groups[index] = joined
