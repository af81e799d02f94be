"""Which position stands at each place where a grid is taken patch by patch? A table, as positions are no view then.

A patch is a box of grid cells, and the digits of a position are its coordinates. A relation is asked in the new places
by what it says of digits, which are looked up: so any grid will do, however its sides end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from patterndsl.ir.index import Const, Index, K, Param, Q, Read, Var, arithmetic
from patterndsl.ir.linear import Frame, Range
from patterndsl.ir.relation import Relation
from patterndsl.lower.geometry import Integers
from patterndsl.lower.lookup import Lookup


@dataclass(frozen=True, slots=True)
class Patches:
    """A grid cut into boxes. chain: ascending divisors of positions, whose digits are coordinates, the lowest first and
    the last one without end. sizes: cells of a box along each; offsets: a coordinate at which one begins."""

    chain: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def text(self) -> str:
        """As a user would say it, the slowest axis first."""
        return f"patches of {' x '.join(map(str, self.sizes[::-1]))}, positions by {', '.join(map(str, self.chain))}"


@dataclass(frozen=True, slots=True)
class Order:
    """Positions [start, start + length) patch by patch, those of a patch as they lie. Patches that a side of the grid
    cuts off come last, so that blocks of places and whole patches begin together."""

    patches: Patches
    start: int
    length: int

    def positions(self) -> Integers:
        """int64 [length]: the position at each place, counted from `start`."""
        digits = digits_of(np.arange(self.start, self.start + self.length), self.patches.chain)
        numbers, cut = list[Integers](), np.zeros(self.length, dtype=np.int64)
        for digit, size, offset in zip(digits, self.patches.sizes, self.patches.offsets, strict=True):
            number = (digit - offset) // size
            first = number * size + offset
            is_cut = (first < digit.min(initial=0)) | (first + size > digit.max(initial=0) + 1)
            numbers.append(number - number.min(initial=0))
            cut = 2 * cut + is_cut
        key = cut
        for number in reversed(numbers):
            key = key * (int(number.max(initial=0)) + 1) + number
        return np.argsort(key, kind="stable")


def digits_of(positions: Integers, chain: Sequence[int]) -> list[Integers]:
    """The coordinates of positions, the lowest digit first."""
    weights = (1, *chain)
    lower = [positions % above // weight for weight, above in zip(weights, chain, strict=False)]
    return [*lower, positions // weights[-1]]


def placed(relation: Relation, q: Order, k: Order) -> tuple[Relation, Lookup]:
    """The relation of local positions as one of places, and what it looks up: the digits of what stands there."""
    put: dict[Var | Param, Index] = {}
    ranges: dict[Index, Range] = {}
    tables: dict[str, Integers] = {}
    sides: Sequence[tuple[Literal["q", "k"], Order]] = (("q", q), ("k", k))
    for side, order in sides:
        symbol = Q if side == "q" else K
        total: Index = Const(-order.start)
        digits = digits_of(order.positions() + order.start, order.patches.chain)
        for at, (digit, weight) in enumerate(zip(digits, (1, *order.patches.chain), strict=True)):
            read = Read(f"{side}.{at}", "value", symbol)
            tables[read.name] = digit
            ranges[read] = int(digit.min(initial=0)), int(digit.max(initial=0))
            total = arithmetic("+", total, arithmetic("*", read, Const(weight)))
        put[symbol] = total
    return Frame(put, ranges).relation(relation), Lookup(tables)
