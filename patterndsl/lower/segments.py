"""Which query blocks are computed together where live blocks of keys are gathered? Those whose lists are about as long.

A long list is cut, and its parts are computed in waves, in each of which a query block has one part at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from patterndsl.lower.tiles import Tiles

MAX_SEGMENT = 4096
"""Keys of one query block handled at once; longer lists are merged segment by segment."""
LARGE = 1 << 14
"""Scores of the lists of one length from which on these are taken by themselves: padding would cost more."""


def list_limit(kv_block: int) -> int:
    """Tiles of a list that are computed at once."""
    return max(1, MAX_SEGMENT // kv_block)


def length_ranges(numbers: Sequence[int], pairs: int) -> Iterator[tuple[int, int]]:
    """Ranges (low, high] of lengths that share a segment: within a quarter of each other, but those with `LARGE` scores
    by themselves. numbers: of lists of each length, of tiles of so many pairs."""
    low, large = 0, LARGE // pairs
    while low < len(numbers) - 1:
        high = min(low + max(1, low // 4), len(numbers) - 1)
        apart = next((width for width in range(low + 1, high + 1) if numbers[width] * width >= large), high + 1)
        high = max(low + 1, apart - 1)
        if any(numbers[low + 1 : high + 1]):
            yield low, high
        low = high


def num_segments(tiles: Tiles) -> int:
    """How many there are. Work: O(tiles)."""
    limit, left = list_limit(tiles.kv_block), np.bincount(tiles.q_blks)
    found = 0
    while left.any():
        numbers = np.bincount(np.minimum(left, limit)).tolist()
        found += sum(1 for _ in length_ranges(numbers, tiles.q_block * tiles.kv_block))
        left = np.maximum(left - limit, 0)
    return found
