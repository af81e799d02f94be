"""In which order of positions do the pairs of a pattern fill few tiles? Orders found in the predicate, and counted.

A stride, a grid's column or a square of pixels is dense after the right permutation. What positions are divided by says
which permutations to try; the live tiles of each are counted from the list of pairs, so every number here is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, TypeAlias

import numpy as np

Integers: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Truths: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

BLOCKS = (32, 64, 128, 256)
USUAL_BLOCK = 128
WORTHWHILE = 1.5
"""Another order, or blocks of half the size, must save a third of the tiles' area: small tiles run slower."""
MAX_MOVED = 1 << 23
"""Pairs that are counted in new places, over all orders."""
PATCH = 128
"""Positions of a patch of a grid: a tile."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Queries and keys in some order; places: int64 [n], where each position goes. `text` says how they are sorted."""

    text: str
    q_places: Integers
    k_places: Integers

    def live(self, q: Integers, k: Integers, block: int) -> Truths:
        """bool [blocks, blocks]: the tiles that hold one of the pairs."""
        num_blks = -(-len(self.q_places) // block)
        live = np.zeros(num_blks * num_blks, dtype=bool)
        live[(self.q_places // block * num_blks)[q] + (self.k_places // block)[k]] = True
        return live.reshape(num_blks, num_blks)

    def areas(self, q: Integers, k: Integers) -> dict[int, int]:
        """Positions of the live tiles by block; the tiles of each block are four of the one before."""
        live, found = self.live(q, k, BLOCKS[0]), {}
        for block in BLOCKS:
            found[block] = area(live, block)
            live = np.pad(live, [(0, size % 2) for size in live.shape])
            live = live[::2, ::2] | live[1::2, ::2] | live[::2, 1::2] | live[1::2, 1::2]
        return found


def area(live: Truths, block: int) -> int:
    """Positions of the live tiles, whole ones."""
    return int(np.count_nonzero(live)) * block**2


def as_written(n: int) -> Layout:
    """Positions where they are."""
    places = np.arange(n, dtype=np.int64)
    return Layout("", places, places)


def best(n: int, pairs: tuple[Integers, Integers], divisors: Sequence[int]) -> Layout:
    """The order with the fewest live tiles of the usual block; positions where they are unless that is clearly more."""
    found = as_written(n)
    least = area(found.live(*pairs, USUAL_BLOCK), USUAL_BLOCK) / WORTHWHILE
    tries = MAX_MOVED // max(1, len(pairs[0]))
    for layout in islice(_candidates(n, divisors), tries):
        found_area = area(layout.live(*pairs, USUAL_BLOCK), USUAL_BLOCK)
        if found_area < least:
            found, least = layout, found_area
    return found


def best_block(areas: Mapping[int, float]) -> int:
    """The block whose tiles are worth their size, given the area of the live tiles by block, in any unit."""
    block = USUAL_BLOCK
    while block // 2 in areas and areas[block] >= WORTHWHILE * areas[block // 2]:
        block //= 2
    return block


def _candidates(n: int, divisors: Sequence[int]) -> Iterator[Layout]:
    """Classes of remainders, of keys alone or of both sides; patches of a grid with that many columns."""
    at = np.arange(n, dtype=np.int64)
    proper = [divisor for divisor in divisors if 1 < divisor < n]
    for divisor in proper:
        places = _places(at % divisor)
        yield Layout(f"with only the keys sorted by position % {divisor}", at, places)
        yield Layout(f"sorted by position % {divisor}", places, places)
    for columns in proper:
        sides = [size for size in (8, 16, *proper) if size < columns]
        for height, width in dict.fromkeys(product(sides, sides)):
            if height * width > PATCH:
                continue
            row, column = at // columns, at % columns
            patch = row // height * -(-columns // width) + column // width
            places = _places(patch)
            yield Layout(f"ordered in patches of {height} x {width} of a grid with {columns} columns", places, places)


def _places(keys: Integers) -> Integers:
    """Where each position goes when they are sorted by key, and by position where keys are equal."""
    places = np.empty(len(keys), dtype=np.int64)
    places[np.argsort(keys, stable=True)] = np.arange(len(keys), dtype=np.int64)
    return places
