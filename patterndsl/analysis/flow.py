"""Where does content flow, layer by layer? From one position at any length, and from all at once where N is small.

One position: sets of positions walk through the rows of the pattern, of which only those in live tiles are looked at.
All positions: Boolean matrices of packed bits, multiplied by tables of eight rows. Each layer keeps a position's own
content (the residual connection) and mixes what its heads bring, so heads are united.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from patterndsl.ir.index import Index, K, Param, Q, Var
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation, compare, conjunction, disjunction, substitute
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.row import last_query, row_keys
from patterndsl.lower.tiles import OnEvent, Tiles, find_tiles
from patterndsl.sema.bind import Bound, Sizes

Bools: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Bits: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
"""Truth values in bytes, the least bit first."""

Known = TypeVar("Known", Bools, Bits)

TILE = 64
CHUNK = 1 << 14
"""Rows of tiles that are looked at together."""
EFFORT = 1 << 16
"""Boxes spent on tiles that are hard to decide; the others count as partial, which costs time and nothing else."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A relation, and which tiles of each block of queries are live: starts[q_blk] to starts[q_blk + 1]."""

    relation: Relation
    tiles: Tiles
    starts: Integers


@dataclass
class Stack:
    """The layers of a self-attention of n positions, the bottom one first; after `period` layers they begin again.

    What is found of a layer is kept, so that it is found once.
    """

    layer_of: Callable[[int], Bound]
    period: int
    lookup: Lookup
    on_event: OnEvent | None = None
    _relations: dict[int, Relation] = field(default_factory=dict)
    _rows: dict[Relation, Rows] = field(default_factory=dict)

    @property
    def sizes(self) -> Sizes:
        return self.layer_of(0).sizes

    @property
    def n(self) -> int:
        return self.sizes.total

    def relation(self, layer: int) -> Relation:
        """The pairs of a layer, all heads united."""
        at = layer % self.period
        if at not in self._relations:
            self._relations[at] = disjunction(group.relation for group in self.layer_of(at).groups)
        return self._relations[at]

    def relations(self) -> tuple[Relation, ...]:
        """Those of the whole period, each once."""
        return tuple(dict.fromkeys(map(self.relation, range(self.period))))

    def rows(self, relation: Relation) -> Rows:
        """The relation's live tiles by block of queries."""
        if relation not in self._rows:
            tiles = find_tiles(relation, self.sizes, self.lookup, TILE, TILE, effort=EFFORT, on_event=self.on_event)
            starts = np.searchsorted(tiles.q_blks, np.arange(tiles.num_q_blocks + 1))
            self._rows[relation] = Rows(relation, tiles, starts)
        return self._rows[relation]


def transposed(relation: Relation) -> Relation:
    """{(k, q) : (q, k) in the relation}, for as many queries as keys."""

    def put(symbol: Var | Param) -> Index:
        return {Q: K, K: Q}.get(symbol, symbol) if isinstance(symbol, Var) else symbol

    return substitute(relation, put)


# ---- from one position --------------------------------------------------------------------------------------


def field_of(stack: Stack, q: int, num_layers: int) -> Bools:
    """bool [n]: the positions whose content can reach q through the lowest `num_layers` layers; q itself always.

    Work: the rows of the positions found, in live tiles.
    """
    known: Bools = np.arange(stack.n) == q
    fresh: dict[Relation, Bools] = {}
    quiet = 0
    for layer in reversed(range(num_layers)):
        new = _advance(
            stack.relation(layer), known, fresh, lambda relation, offer: _seen(stack, relation, offer, known)
        )
        quiet = 0 if new.any() else quiet + 1
        if quiet == stack.period:
            break
    return known


def levels(stack: Stack, k: int, until: int | None = None) -> Integers:
    """int64 [n]: after how many layers the content of k first reaches each position; -1 where it never does.

    until: stops where this position is reached; others that would be later are then -1. Work: as for `field_of`, of
    the columns.
    """
    level = np.where(np.arange(stack.n) == k, 0, -1)
    known = level == 0
    fresh: dict[Relation, Bools] = {}
    layer = quiet = 0
    while quiet < stack.period and (until is None or not known[until]):
        relation = transposed(stack.relation(layer))
        new = _advance(relation, known, fresh, lambda it, offer: _seen(stack, it, offer, known))
        layer, quiet = layer + 1, 0 if new.any() else quiet + 1
        level[new] = layer
    return level


def path(stack: Stack, q: int, k: int) -> tuple[int, ...] | None:
    """Where the content of k is after 0, 1, 2, ... layers on a shortest way to q: k first, q last; None without a way.

    From one layer to the next it stays where it is, or goes to a position that attends it.
    """
    level = levels(stack, k, until=q)
    if level[q] < 0:
        return None
    hops = [q]
    for layer in reversed(range(int(level[q]))):
        here = hops[-1]
        if level[here] > layer:
            keys = row_keys(stack.relation(layer), stack.sizes, stack.lookup, here)
            here = int(keys[(level[keys] >= 0) & (level[keys] <= layer)][0])
        hops.append(here)
    return tuple(reversed(hops))


def _advance(
    relation: Relation, known: Known, fresh: dict[Relation, Known], further: Callable[[Relation, Known], Known]
) -> Known:
    """What a layer adds to what is known, which it changes.

    fresh: what has come since a relation was applied last; to apply it to the rest again adds nothing.
    """
    new = further(relation, fresh.pop(relation, known)) & ~known
    known |= new
    for waiting in fresh.values():
        waiting |= new
    fresh[relation] = new.copy()
    return new


def _seen(stack: Stack, relation: Relation, queries: Bools, known: Bools) -> Bools:
    """bool [n]: the keys that some of the queries attend. Blocks of keys that are all known are not looked at."""
    rows = stack.rows(relation)
    tiles = rows.tiles
    blocks = np.ones((tiles.num_kv_blocks, TILE), dtype=bool)
    found = blocks.reshape(-1)
    found[: stack.n] = known
    inside = np.arange(TILE)
    for q, at in _rows_of_tiles(rows, np.flatnonzero(queries)):
        is_open = ~blocks[tiles.kv_blks[at]].all(axis=1)
        q, at = q[is_open], at[is_open]
        blocks[tiles.kv_blks[at[tiles.is_full[at]]]] = True
        is_partial = ~tiles.is_full[at]
        q, ks = q[is_partial, None], (tiles.kv_blks[at[is_partial]] * TILE)[:, None] + inside
        kept = np.broadcast_to(member(relation, Point(q, ks, 0, stack.lookup)), ks.shape)
        found[ks[kept]] = True
    return found[: stack.n]


def _rows_of_tiles(rows: Rows, queries: Integers) -> Iterator[tuple[Integers, Integers]]:
    """Each query with each live tile of its block: (q, number of the tile), in chunks."""
    starts, ends = rows.starts[queries // TILE], rows.starts[queries // TILE + 1]
    stops: Integers = np.cumsum(ends - starts)
    total = int(stops[-1]) if len(stops) else 0
    for low in range(0, total, CHUNK):
        place = np.arange(low, min(total, low + CHUNK))
        q_at = np.searchsorted(stops, place, side="right")
        yield queries[q_at], ends[q_at] - stops[q_at] + place


# ---- from all positions -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A Boolean matrix of positions, or of blocks of them. bits[group, q]: the keys 8 group to 8 group + 7 of row q.

    is_exact: a block stands for each of its positions, as it does where all live tiles are full.
    """

    bits: Bits
    is_exact: bool = True


@dataclass(frozen=True, slots=True)
class FieldSizes:
    """How many positions can reach a query: the fewest, the mean over all queries, and the most."""

    least: int
    mean: float
    most: int


@dataclass(frozen=True, slots=True, eq=False)
class Growth:
    """What reaches each position, as layers are added. Of blocks it is no less than what reaches their positions.

    sizes: after 0, 1, 2, ... layers, the last that added something included. reached: bits [rows, groups], in the end.
    is_closed: further layers add nothing. is_exact: blocks, if any, stand for each of their positions.
    """

    sizes: tuple[FieldSizes, ...]
    reached: Bits
    is_closed: bool
    is_exact: bool


def grow(
    stack: Stack,
    matrix_of: Callable[[Relation], Matrix],
    lengths: Integers,
    *,
    complete: Bits,
    most_layers: int | None = None,
) -> Growth:
    """Layer after layer, until a whole period adds nothing, `complete` is reached or `most_layers` are through.

    lengths: how many positions a row or column stands for; only the last may be shorter. complete: what cannot grow.
    Work per layer: what the layers before added to a row, once for every eight keys that a row attends.
    """
    matrices: dict[Relation, Matrix] = {}
    fresh: dict[Relation, Bits] = {}
    reached = packed(np.eye(len(lengths), dtype=bool))
    alone = min(1, stack.n)
    sizes, quiet, layer = [FieldSizes(alone, alone, alone)], 0, 0

    def further(relation: Relation, offer: Bits) -> Bits:
        if relation not in matrices:
            matrices[relation] = matrix_of(relation)
        return _product(matrices[relation].bits, offer, stack.on_event, f"composing layer {layer + 1}")

    while quiet < stack.period and layer != most_layers and not np.array_equal(reached, complete):
        new = _advance(stack.relation(layer), reached, fresh, further)
        layer, quiet = layer + 1, 0 if new.any() else quiet + 1
        sizes.append(_field_sizes(reached, lengths))
    is_closed = quiet == stack.period or np.array_equal(reached, complete)
    is_exact = all(matrix.is_exact for matrix in matrices.values())
    while len(sizes) > 1 and sizes[-1] == sizes[-2]:
        sizes.pop()
    return Growth(tuple(sizes), reached, is_closed, is_exact)


MAX_SWEEPS = 12
"""Over all rows, up and down; a pattern whose content goes to and fro more often is followed layer by layer."""


def closed(stack: Stack, growth: Growth, matrix_of: Callable[[Relation], Matrix], lengths: Integers) -> Growth | None:
    """What any number of further layers adds, without following them; its sizes are followed by those of the end.

    A row takes in the rows of all that it attends in any layer, one row after the other, up and down until nothing
    changes. None where that takes too long. Work: for each sweep a union of rows for each pair.
    """
    reached, n = growth.reached.copy(), len(lengths)
    attended = [matrix_of(relation).bits for relation in stack.relations()]
    united = np.bitwise_or.reduce(attended).T
    keys = [np.flatnonzero(row) for start in range(0, n, TILE) for row in unpacked(united[start : start + TILE], n)]
    quiet = 0
    for sweep in range(MAX_SWEEPS):
        changed = False
        for q in range(n) if sweep % 2 == 0 else reversed(range(n)):
            row = np.bitwise_or.reduce(reached[keys[q]], axis=0, initial=0) | reached[q]
            if not np.array_equal(row, reached[q]):
                reached[q], changed = row, True
        quiet = 0 if changed else quiet + 1
        if quiet:
            return Growth((*growth.sizes, _field_sizes(reached, lengths)), reached, True, growth.is_exact)
    return None


def _field_sizes(reached: Bits, lengths: Integers) -> FieldSizes:
    if not len(lengths):
        return FieldSizes(0, 0.0, 0)
    has_last = reached[:, -1] >> np.uint8((len(lengths) - 1) % 8) & 1
    counts = np.bitwise_count(reached).sum(axis=1, dtype=np.int64) * lengths[0]
    counts -= has_last * (lengths[0] - lengths[-1])
    return FieldSizes(int(counts.min()), float(np.average(counts, weights=lengths)), int(counts.max()))


def _product(matrix: Bits, offer: Bits, on_event: OnEvent | None, what: str) -> Bits:
    """The rows of `offer` that each row of the matrix has, united: each union of eight rows is made once.

    (Arlazarov, Dinic, Kronrod and Faradzev 1970.) Only the columns in which the eight rows have something take part.
    """
    found = np.zeros_like(offer)
    for group, keys in enumerate(matrix):
        eight = offer[8 * group : 8 * group + 8]
        columns, rows = np.flatnonzero(eight.any(axis=0)), np.flatnonzero(keys)
        if len(columns) and len(rows):
            part = slice(int(columns[0]), int(columns[-1]) + 1)
            unions = np.zeros((256, part.stop - part.start), dtype=np.uint8)
            for at, row in enumerate(eight[:, part]):
                unions[1 << at : 2 << at] = unions[: 1 << at] | row
            found[rows, part] |= unions[keys[rows]]
        if on_event is not None:
            on_event(what, group + 1, len(matrix))
    return found


def packed(pairs: Bools) -> Bits:
    """bool [rows, columns] as bits [rows, groups]."""
    return np.packbits(pairs, axis=1, bitorder="little")


def first_columns(counts: Integers) -> Bits:
    """Bits of a square matrix of which row r has the first counts[r] columns."""
    groups = np.arange(0, len(counts), 8, dtype=np.int32)
    return ((1 << (counts.astype(np.int32)[:, None] - groups).clip(0, 8)) - 1).astype(np.uint8)


def unpacked(bits: Bits, num_columns: int) -> Bools:
    """bits [rows, groups] as bool [rows, columns]."""
    return np.unpackbits(bits, axis=1, count=num_columns, bitorder="little").view(bool)


def positions(stack: Stack, relation: Relation) -> Matrix:
    """The relation itself. Memory: n^2 / 8 bytes, twice; work: the pairs of its partial tiles."""
    tiles, n = stack.rows(relation).tiles, stack.n
    bits = np.zeros((tiles.num_q_blocks, TILE, tiles.num_kv_blocks, TILE // 8), dtype=np.uint8)
    bits[tiles.q_blks[tiles.is_full], :, tiles.kv_blks[tiles.is_full]] = 255
    inside, partial = np.arange(TILE), np.flatnonzero(~tiles.is_full)
    for at in np.array_split(partial, len(partial) * TILE // CHUNK + 1):
        q, k = ((blks[at] * TILE)[:, None] + inside for blks in (tiles.q_blks, tiles.kv_blks))
        q, k = q[:, :, None], k[:, None]
        kept = member(relation, Point(q, k, 0, stack.lookup)) & (q < n) & (k < n)
        bits[tiles.q_blks[at], :, tiles.kv_blks[at]] = np.packbits(kept, axis=2, bitorder="little")
    groups = bits.reshape(tiles.num_q_blocks * TILE, -1)[:n, : -(-n // 8)].T.copy()
    groups[-1] &= 255 >> (-n % 8)  # full tiles reach beyond the last position
    return Matrix(groups)


def blocks(stack: Stack, relation: Relation, block: int) -> Matrix:
    """Which blocks have a pair in common. Exact where each live tile is full, those of a block with itself included."""
    tiles = find_tiles(relation, stack.sizes, stack.lookup, block, block, effort=EFFORT, on_event=stack.on_event)
    live = np.zeros((tiles.num_q_blocks, tiles.num_kv_blocks), dtype=bool)
    live[tiles.q_blks, tiles.kv_blks] = True
    return Matrix(packed(live).T.copy(), bool(tiles.is_full.all() and live.diagonal().all()))


def looks_ahead(stack: Stack, relation: Relation) -> bool:
    """Whether some query attends a later key. Exact. Work: at least the tiles of the diagonal."""
    later = conjunction((relation, compare("<", Q, K)))
    tiles = find_tiles(later, stack.sizes, stack.lookup, TILE, TILE, tell_full=False, on_event=stack.on_event)
    return tiles.num_tiles > 0


def without_partner(stack: Stack, of: Literal["q", "k"]) -> Integers:
    """The queries that attend nobody but themselves in any layer, or the keys that nobody else attends. Exact."""
    alone = np.arange(stack.n)
    for relation in stack.relations():
        others = conjunction((relation if of == "k" else transposed(relation), compare("!=", Q, K)))
        alone = alone[last_query(others, stack.sizes, stack.lookup, alone) < 0]
    return alone
