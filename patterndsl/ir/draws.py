"""Which keys does `random` draw? The same ones on every device, in every process, for any number of rows.

Row q walks through all keys in an order of its own, a keyed permutation of [0, num_k), and takes the first `count`
that `avoid` does not hold. The permutation is a twelve-round Feistel network over the next even power of two, walked
until it falls inside the range (cycle walking: Black and Rogaway 2002), so draws are distinct and unbiased without a
table of what was taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from patterndsl.ir.index import Const, Facet, Index
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Random

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

ROUNDS = 12
"""Eight are visibly biased on pairs of keys in ranges below 16 (chi-square over 60,000 rows); ten and more are not."""
MAX_CANDIDATES = 1 << 21
"""Candidates looked at in one step, over all rows."""


def constant(index: Index) -> int:
    """The value of a bound expression."""
    assert isinstance(index, Const), f"{index} is not bound"
    return index.value


class NoInputs:
    """Data of a relation that reads no input, as `avoid` does not; draws inside draws are looked up."""

    def read(self, name: str, facet: Facet, index: object) -> object:
        raise AssertionError(f"input {name} is read where none can be")

    def lists(self, node: object, row: object, key: object) -> object:
        raise AssertionError("lists are read where none can be")

    def drawn(self, node: Random, head: object, q: Array) -> Iterable[Array]:
        return drawn_for(draw(node), q)


def drawn_for(keys: Array, q: Array) -> Iterable[Array]:
    """The columns of a [num_q, count] table at rows q; -1 for rows outside it."""
    if not keys.shape[0]:
        return
    row, inside = np.clip(q, 0, keys.shape[0] - 1), (q >= 0) & (q < keys.shape[0])
    for turn in range(keys.shape[1]):
        yield np.where(inside, keys[row, turn], -1)


def width_drawn(node: Random) -> int:
    """How many keys a query draws at most."""
    return max(0, min(constant(node.count), constant(node.num_k)))


@lru_cache(maxsize=64)
def draw(node: Random) -> Array:
    """[num_q, count] int64: the keys drawn for each query, ascending, -1 behind them where fewer are left.

    The node must be bound: count, seed, lengths and avoid free of everything but q and k. Work: O(num_q x count)
    for the usual sparse `avoid`; a row that may see few keys looks at up to num_k candidates.
    """
    count, num_q, num_k = width_drawn(node), constant(node.num_q), constant(node.num_k)
    keys = np.full((num_q, count), num_k, dtype=np.int64)
    taken = np.zeros(num_q, dtype=np.int64)
    rows = np.arange(num_q, dtype=np.int64)
    seed = constant(node.seed)
    step, stride = 0, max(1, 2 * count)
    while count and len(rows) and step < num_k:
        stride = min(stride, num_k - step, max(1, MAX_CANDIDATES // len(rows)))
        turns = np.arange(step, step + stride, dtype=np.int64)
        candidates = _permuted(turns[None, :], rows[:, None], seed, num_k)
        avoided = member(node.avoid, Point(rows[:, None], candidates, 0, NoInputs()))
        free = np.broadcast_to(~np.asarray(avoided, dtype=bool), candidates.shape)
        place = taken[rows][:, None] + np.cumsum(free, axis=1) - 1
        at, turn = np.nonzero(free & (place < count))
        keys[rows[at], place[at, turn]] = candidates[at, turn]
        taken[rows] = np.minimum(taken[rows] + free.sum(axis=1), count)
        rows = rows[taken[rows] < count]
        step += stride
        stride *= 2
    keys.sort(axis=1)
    keys[keys == num_k] = -1
    keys.setflags(write=False)
    return keys


def _permuted(turn: Array, row: Array, seed: int, size: int) -> Array:
    """The turn-th key in row's order of [0, size)."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    key = _mixed(row.astype(np.uint64) + _mixed(np.full((), seed & (2**64 - 1), dtype=np.uint64)))
    x = _once(turn.astype(np.uint64), key, half_bits)
    key = np.broadcast_to(key, x.shape)
    outside = np.nonzero(x >= size)
    while len(outside[0]):
        again = _once(x[outside], key[outside], half_bits)
        x[outside] = again
        outside = tuple(part[again >= size] for part in outside)
    return x.astype(np.int64)


def _once(x: Array, key: Array, half_bits: int) -> Array:
    """Each x of 2 * half_bits bits as the network of its key has it."""
    half, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = x >> shift, x & half
    for _ in range(ROUNDS):
        key = _mixed(key)  # of a row, where x is a row of them
        left, right = right, left ^ (_mixed(right ^ key) & half)
    return (left << shift) | right


def _mixed(x: Array) -> Array:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every bit of x moves every bit of the result."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        return x


class DrawnCells:
    """The drawn pairs as a pyramid of occupied cells: is there any pair in a box of queries and keys?"""

    def __init__(self, keys: Array) -> None:
        rows, places = np.nonzero(keys >= 0)
        self._q = rows.astype(np.int64)
        self._k = keys[rows, places]
        self._width = int(self._k.max(initial=0)) + 1
        self._levels: dict[tuple[int, int], Array] = {}

    def _occupied(self, q_level: int, k_level: int) -> Array:
        """Sorted codes of the cells of 2^q_level x 2^k_level positions that hold a pair."""
        level = self._levels.get((q_level, k_level))
        if level is None:
            level = self._levels[q_level, k_level] = self._codes(q_level, k_level)
        return level

    def _codes(self, q_level: int, k_level: int) -> Array:
        codes = np.sort((self._q >> q_level) * self._width + (self._k >> k_level))
        return codes[np.append(True, codes[1:] != codes[:-1])] if len(codes) else codes  # faster than np.unique

    def any_within(self, q_low: Array, q_high: Array, k_low: Array, k_high: Array) -> Array:
        """For boxes [q_low, q_high] x [k_low, k_high]: False only where no pair is inside; exact for single points.

        A box is covered by at most 2 x 2 cells, so it may also see a pair near its border.
        """
        q_level, k_level = _cover_level(q_low, q_high), _cover_level(k_low, k_high)
        found = np.zeros(q_low.shape, dtype=bool)
        for code_of_levels in np.unique(q_level * 64 + k_level).tolist():  # far faster than unique pairs
            q_at, k_at = divmod(code_of_levels, 64)
            here = (q_level == q_at) & (k_level == k_at)
            codes = self._occupied(q_at, k_at)
            if not len(codes):
                continue
            for q in (q_low[here] >> q_at, q_high[here] >> q_at):
                for k in (k_low[here] >> k_at, k_high[here] >> k_at):
                    code = q * self._width + k
                    place = np.minimum(np.searchsorted(codes, code), len(codes) - 1)
                    inside = (q >= 0) & (k >= 0) & (k < self._width)
                    found[here] |= (codes[place] == code) & inside
        return found


class TableCells(DrawnCells):
    """The same of a table of truths, bool [queries, keys], where so many pairs hold that their codes take long."""

    def __init__(self, table: Array) -> None:
        self._width = table.shape[1]
        self._levels = {}
        self._tables: dict[tuple[int, int], Array] = {(0, 0): table}

    def _codes(self, q_level: int, k_level: int) -> Array:
        rows, columns = np.nonzero(self._table(q_level, k_level))
        return rows * self._width + columns

    def _table(self, q_level: int, k_level: int) -> Array:
        """Which cells hold a pair: two of the finer level are one, queries first, whose rows lie together."""
        found = self._tables.get((q_level, k_level))
        if found is None:
            by_queries = q_level > k_level
            finer = self._table(q_level - by_queries, k_level - (not by_queries))
            found = _halved(finer) if by_queries else np.ascontiguousarray(_halved(finer.T).T)
            self._tables[q_level, k_level] = found
        return found


def _halved(table: Array) -> Array:
    """Two rows in one, the last alone where their number is odd."""
    pairs = table[: len(table) // 2 * 2]
    return np.concatenate([pairs[::2] | pairs[1::2], table[len(pairs) :]])


def _cover_level(low: Array, high: Array) -> Array:
    """The least level whose cells of 2^level cover [low, high] with two."""
    extent = high - low
    level = np.zeros(extent.shape, dtype=np.int64)
    for bit in range(int(extent.max(initial=0)).bit_length()):
        level += extent >= (1 << bit)
    return level
