"""Which keys has one query, which queries has one key, and which query of a key is its last? Interval descent on lines.

One position is fixed and the other side descended, three-valued: what is all kept is one run, what is none is pruned,
the rest is split in four. For the last (or first) query of many keys at once, each walks through boxes of queries from
that end on, and keys that share a fate walk together. Work follows runs and answers; nothing here is N x N, unless
the interval verdict cannot tell a box from an empty one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from patterndsl.ir.interval import Box, Interval, verdict
from patterndsl.ir.relation import Relation
from patterndsl.lower.lookup import Array, Lookup
from patterndsl.lower.tiles import CHUNK, OnEvent
from patterndsl.sema.bind import Sizes

End: TypeAlias = Literal["first", "last"]

FAN_BITS = 2
"""A box of a line is split in 2^FAN_BITS: half the passes of a binary split, for few more boxes."""


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Positions [starts[run], stops[run]), int64 [num_runs], ascending, with gaps between them.

    num_visited counts the boxes that were looked at.
    """

    starts: Array
    stops: Array
    num_visited: int

    @property
    def num_positions(self) -> int:
        return int((self.stops - self.starts).sum())


@dataclass(frozen=True, slots=True, eq=False)
class EndQueries:
    """The first or last query of each key, int64 [num_keys], -1 where a key has none."""

    queries: Array
    num_visited: int


def row_keys(relation: Relation, sizes: Sizes, lookup: Lookup, q: int) -> Array:
    """int64: the ascending keys of query q (an absolute position). Work: O(keys + boxes), see `row_runs`."""
    return _positions(row_runs(relation, sizes, lookup, q), lookup)


def column_queries(relation: Relation, sizes: Sizes, lookup: Lookup, k: int) -> Array:
    """int64: the ascending absolute positions of the queries that attend key k."""
    return _positions(column_runs(relation, sizes, lookup, k), lookup)


def row_runs(relation: Relation, sizes: Sizes, lookup: Lookup, q: int) -> Runs:
    """The keys of query q as runs. Work: O(runs x log kv_len) boxes where the verdict is sharp; a run is not split."""
    assert sizes.q_start <= q < sizes.q_start + sizes.q_len, f"no query {q}"
    return _line(relation, lookup, 0, sizes.kv_len, lambda at, run: (at + q, run))


def column_runs(relation: Relation, sizes: Sizes, lookup: Lookup, k: int) -> Runs:
    """The queries of key k as runs of absolute positions; work as for `row_runs`."""
    assert 0 <= k < sizes.kv_len, f"no key {k}"
    return _line(relation, lookup, sizes.q_start, sizes.q_len, lambda at, run: (run, at + k))


def last_query(relation: Relation, sizes: Sizes, lookup: Lookup, ks: Array) -> Array:
    """int64 [num_keys]: the greatest query (absolute) that attends each key of ks, -1 where none does."""
    return end_queries(relation, sizes, lookup, ks, "last").queries


def first_query(relation: Relation, sizes: Sizes, lookup: Lookup, ks: Array) -> Array:
    """int64 [num_keys]: the least query (absolute) that attends each key of ks, -1 where none does."""
    return end_queries(relation, sizes, lookup, ks, "first").queries


def end_queries(
    relation: Relation, sizes: Sizes, lookup: Lookup, ks: Array, end: End, *, on_event: OnEvent | None = None
) -> EndQueries:
    """The query at one end of each key's column. ks: int64 [num_keys], within [0, kv_len), in any order.

    Work: O(keys x log q_len) boxes at most where the verdict is sharp, and O(log) for runs of keys that share it.
    """
    return _Ends(relation, sizes, lookup, ks, end, on_event).run()


# ---- one line -----------------------------------------------------------------------------------------------


def _line(
    relation: Relation, lookup: Lookup, start: int, length: int, sides: Callable[[Array, Interval], tuple[Any, Any]]
) -> Runs:
    """The kept positions of [start, start + length), level by level.

    sides: makes the bounds of q and k from zeros of the right shape, and the bounds of the boxes.
    """
    xp, visited = lookup.xp, 0
    empty = lookup.integers(0, 0)
    found: list[tuple[Array, Array]] = [(empty, empty)]
    at, level = lookup.integers(0, min(1, length)), max(0, length - 1).bit_length()
    while at.shape[0]:
        low = start + at * (1 << level)
        high = (low + ((1 << level) - 1)).clip(max=start + length - 1)
        visited += int(at.shape[0])
        q, k = sides(at * 0, (low, high))
        certain, possible = _verdict(relation, lookup, _interval(q), _interval(k))
        found.append((low[certain], high[certain] + 1))
        at = at[possible & ~certain]
        bits = min(FAN_BITS, level)
        assert bits or not at.shape[0], "the verdict on a point is exact"
        level -= bits
        at = xp.reshape((at * (1 << bits))[:, None] + lookup.integers(0, 1 << bits), (-1,))
        at = at[at * (1 << level) < length]
    starts, stops = (xp.concat([part[side] for part in found]) for side in range(2))
    order = xp.argsort(starts)
    return Runs(*_joined(starts[order], stops[order], xp), visited)


def _interval(side: Any) -> Interval:
    return side if isinstance(side, tuple) else (side, side)


def _joined(starts: Array, stops: Array, xp: Any) -> tuple[Array, Array]:
    """Runs that touch made one."""
    if not starts.shape[0]:
        return starts, stops
    gap = starts[1:] != stops[:-1]
    edge = xp.ones_like(starts[:1], dtype=xp.bool)
    return starts[xp.concat((edge, gap))], stops[xp.concat((gap, edge))]


def _positions(runs: Runs, lookup: Lookup) -> Array:
    """Every position of the runs."""
    lengths = runs.stops - runs.starts
    before = lookup.xp.cumulative_sum(lengths) - lengths
    return lookup.xp.repeat(runs.starts - before, lengths) + lookup.integers(0, runs.num_positions)


def _verdict(relation: Relation, lookup: Lookup, q: Interval, k: Interval) -> tuple[Array, Array]:
    """(certain, possible), bool arrays of one value for each box."""
    like = k[0]

    def spread(truths: Any) -> Array:
        if isinstance(truths, bool):
            return lookup.xp.full(like.shape, truths, dtype=lookup.xp.bool, device=lookup.device)
        return lookup.xp.broadcast_to(truths, like.shape)

    certain, possible = verdict(relation, Box(q, k, lookup))
    return spread(certain), spread(possible)


# ---- the end of many lines ----------------------------------------------------------------------------------


_Walkers: TypeAlias = tuple[Array, Array, Array, Array]
"""first_key, last_key (inclusive places in the sorted keys), and the box of queries that comes next: at, level."""


@dataclass
class _Ends:
    """Runs of keys walk through a binary tree of queries, the wanted end first, each depth first.

    Queries are counted as `rank`, so that the wanted one is the greatest: from the first query for "last", from the
    last one backwards for "first". Box (at, level) holds the ranks [at << level, (at + 1) << level).
    """

    relation: Relation
    sizes: Sizes
    lookup: Lookup
    ks: Array
    end: End
    on_event: OnEvent | None
    visited: int = 0
    settled: int = 0
    found: list[tuple[Array, Array, Array]] = field(default_factory=list)  # first_key, last_key, rank or -1

    def run(self) -> EndQueries:
        xp, sizes, num_keys = self.lookup.xp, self.sizes, int(self.ks.shape[0])
        if not num_keys or not sizes.q_len:
            return EndQueries(self.ks * 0 - 1, 0)
        order = xp.argsort(self.ks, stable=True)
        self.ks = self.ks[order]
        self.walk()
        first_key, last_key, rank = (xp.concat([part[at] for part in self.found]) for at in range(3))
        by_key = xp.argsort(first_key)
        ranks = xp.repeat(rank[by_key], (last_key - first_key + 1)[by_key])
        queries = xp.where(ranks < 0, -1, self.position(ranks))
        return EndQueries(queries[xp.argsort(order)], self.visited)

    def position(self, rank: Array) -> Array:
        start, length = self.sizes.q_start, self.sizes.q_len
        return rank + start if self.end == "last" else start + length - 1 - rank

    def walk(self) -> None:
        """Depth first over chunks of walkers; as their keys are disjoint there are never more than keys."""
        zero = self.lookup.integers(0, 1)
        levels = (self.sizes.q_len - 1).bit_length()
        stack: list[_Walkers] = [(zero, zero + int(self.ks.shape[0]) - 1, zero, zero + levels)]
        while stack:
            walkers = stack.pop()
            num_walkers = int(walkers[0].shape[0])
            if num_walkers > CHUNK:
                middle = num_walkers // 2
                stack.append(_picked(walkers, slice(0, middle)))
                stack.append(_picked(walkers, slice(middle, None)))
            elif num_walkers:
                stack.append(self.step(walkers))

    def step(self, walkers: _Walkers) -> _Walkers:
        """Every walker looks at its box: it has arrived, goes to the next box, or into this one."""
        xp = self.lookup.xp
        first_key, last_key, at, level = walkers
        self.visited += int(at.shape[0])
        low, high = at << level, (((at + 1) << level) - 1).clip(max=self.sizes.q_len - 1)
        edges = self.position(low), self.position(high)
        q = edges if self.end == "last" else edges[::-1]
        k = self.ks[first_key], self.ks[last_key]
        certain, possible = _verdict(self.relation, self.lookup, q, k)
        self.settle(first_key[certain], last_key[certain], high[certain])
        leaves = ~possible & (at == 0)
        self.settle(first_key[leaves], last_key[leaves], at[leaves] - 1)
        onward = self.next_box(_picked(walkers, ~possible & (at > 0)))
        inside = possible & ~certain
        many, k_extent = first_key < last_key, k[1] - k[0]
        by_key = inside & many & ((k_extent >= high - low) | (level == 0))
        by_query = inside & ~by_key
        parts = (onward, *_halved(_picked(walkers, by_key)), self.upper_half(_picked(walkers, by_query)))
        first_key, last_key, at, level = (xp.concat([part[side] for part in parts]) for side in range(4))
        return first_key, last_key, at, level

    def next_box(self, walkers: _Walkers) -> _Walkers:
        """The greatest aligned box just below this one that has not been looked at."""
        first_key, last_key, at, level = walkers
        xp = self.lookup.xp
        trailing = xp.astype(xp.round(xp.log2(xp.astype(at & -at, xp.float64))), xp.int64)
        return first_key, last_key, (at >> trailing) - 1, level + trailing

    def upper_half(self, walkers: _Walkers) -> _Walkers:
        """The half with the greater ranks, or the lower one where no query is in it."""
        first_key, last_key, at, level = walkers
        exists = ((2 * at + 1) << (level - 1)) < self.sizes.q_len
        return first_key, last_key, 2 * at + self.lookup.xp.astype(exists, at.dtype), level - 1

    def settle(self, first_key: Array, last_key: Array, rank: Array) -> None:
        self.found.append((first_key, last_key, rank))
        self.settled += int((last_key - first_key + 1).sum())
        if self.on_event is not None:
            self.on_event(f"finding {self.end} queries", self.settled, int(self.ks.shape[0]))


def _picked(walkers: _Walkers, at: Any) -> _Walkers:
    first_key, last_key, box, level = walkers
    return first_key[at], last_key[at], box[at], level[at]


def _halved(walkers: _Walkers) -> tuple[_Walkers, _Walkers]:
    """The keys of each walker in two halves, at the same box."""
    first_key, last_key, at, level = walkers
    middle = (first_key + last_key) // 2
    return (first_key, middle, at, level), (middle + 1, last_key, at, level)
